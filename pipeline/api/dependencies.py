"""Dependencies of `/api`'s routes: authentication, request bodies, transactions, and the scope of visible jobs."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Query, Request
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection

from pipeline.api.gateway.cache import Caller
from pipeline.api.pacing import take_turn
from pipeline.api.paths import as_sent
from pipeline.catalog import models
from pipeline.core.errors import InvalidPayload, NotFound, UnknownJob, UserError
from pipeline.jobs import status

Found = TypeVar("Found")
Body = TypeVar("Body", bound=BaseModel)

#: Timeout of a query that a person waits for.
_MOST_SECONDS = 30.0
SECURITY: dict[str, Any] = {"security": [{"bearer": []}]}


class Problem(BaseModel):
    """Problem details of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    #: Request field that is wrong; the detail begins with it. An extension of the RFC's members.
    field: str | None = None


_MEANINGS = {
    400: "The request is invalid.",
    401: "The API key is missing, unknown, revoked or expired.",
    403: "An admin's key is needed.",
    404: "Not found.",
    408: "The rest of the body didn't come; try again.",
    409: "Its state doesn't allow this.",
    413: "The body is too large.",
    422: "The idempotency key was used with another payload.",
    503: "A server that is needed can't be reached; try again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses for the problems of a route: 401, 503 and `statuses`."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in (401, 503, *statuses)}


Workspace = Annotated[
    str | None,
    Query(max_length=200, pattern="^[^\0]*$", description="For admins: only this workspace. Default: all."),
]


async def identify(request: Request, authorization: str | None, *, vectors: bool = False, turns: int = 1) -> Caller:
    """Look up the caller of an Authorization header, and wait for the turn of their workspace.

    Args:
        vectors: the request asks for vectors.
        turns: cost of the request, by processor time.

    Raises:
        Unauthorized, InvalidApiKey: the header has no live key.
        ClientDisconnect: as `take_turn` does.
    """
    caller: Caller = await request.app.state.gateway.cache.caller(authorization)
    request.state.caller = caller
    await take_turn(request, caller.workspace_id, vectors=vectors, turns=turns)
    return caller


async def caller_of(request: Request, *, admin: bool = False, vectors: bool = False, turns: int = 1) -> Caller:
    """Return the caller of a request, as `identify` does.

    Raises:
        Forbidden: `admin` is set, and the key isn't an admin's.
    """
    caller = await identify(request, request.headers.get("authorization"), vectors=vectors, turns=turns)
    if admin:
        caller.must_be_admin()
    return caller


def workspace_of(request: Request) -> int:
    """Return the caller's workspace, as found by `caller_of`. The request takes one of its places."""
    caller: Caller = request.state.caller
    return caller.workspace_id


async def read_body(request: Request, shape: type[Body]) -> Body:
    """Parse a request's body. As a parameter of the route it would be read before authentication.

    Raises:
        InvalidPayload: the body isn't of that shape.
    """
    try:
        return shape.model_validate_json(await request.app.state.transfers.body(request, workspace_of(request)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InvalidPayload(f"{where}: {first['msg']}.", param=where) from None


def described(shape: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a route with such a body, behind a key."""
    content = {"application/json": {"schema": shape.model_json_schema()}}
    return {**SECURITY, "requestBody": {"required": True, "content": content}}


async def ask(request: Request, act: Callable[[Connection], Found]) -> Found:
    """Run `act` in a transaction, off the event loop, in the share of the caller's workspace.

    Raises:
        Busy: the query's turn didn't come in time, or it took too long.
        UpstreamUnavailable: the database is away.
    """
    found: Found = await request.app.state.database.ask_within(_MOST_SECONDS, act, workspace_of(request))
    return found


def scope_of(connection: Connection, caller: Caller, workspace: str | None) -> int | None:
    """Return the workspace that a caller sees; None: all of them.

    Raises:
        NotFound: the workspace asked for doesn't exist, or isn't the caller's own.
    """
    if workspace is None:
        return None if caller.admin else caller.workspace_id
    try:
        found = models.workspace_id(connection, workspace)
    except UserError as error:
        raise NotFound(str(error)) from error
    if found != caller.workspace_id and not caller.admin:
        raise NotFound(f'no workspace "{workspace}".')
    return found


def scope_or_own(connection: Connection, caller: Caller, workspace: str | None) -> int:
    """Return the workspace that a caller names, which an admin may, or else the caller's own."""
    return (scope_of(connection, caller, workspace) if workspace else None) or caller.workspace_id


async def ask_of_job(
    request: Request,
    job: str,
    act: Callable[[Connection, UUID], Found],
    workspace: str | None = None,
    *,
    changes_ended: bool | None = None,
    caller: Caller | None = None,
) -> Found:
    """Run `act` on a job that the caller sees, found as by `visible_job_id`.

    Args:
        changes_ended: set if `act` changes the job: True for one that has ended, False for one that hasn't.
        caller: the caller, if known already.

    Raises: as `visible_job_id`.
    """
    asks = caller or await caller_of(request)

    def run(connection: Connection) -> Found:
        return act(connection, visible_job_id(connection, asks, job, workspace, changes_ended=changes_ended))

    return await ask(request, run)


def visible_job_id(
    connection: Connection,
    caller: Caller,
    job: str,
    workspace: str | None = None,
    *,
    changes_ended: bool | None = None,
) -> UUID:
    """Return the id of a job that the caller sees, found by its id, the beginning of its id, or its name, as a path
    holds it.

    An admin's own workspace is searched before the others.

    Args:
        changes_ended: set if the job is to be changed: True for one that has ended, False for one that hasn't.

    Raises:
        UnknownJob: the caller sees no such job.
        UserError: several jobs fit: their ids begin so, or, for a change, they have this name.
    """
    scope, sought = scope_of(connection, caller, workspace), as_sent(job)

    def found(within: int | None) -> UUID:
        if changes_ended is None:
            return status.find_job(connection, within, sought)
        return status.find_job_to_change(connection, within, sought, ended=changes_ended)

    try:
        return found(scope or caller.workspace_id)
    except UnknownJob:
        if scope is not None:
            raise
        return found(None)
