"""Dependencies of `/api`'s routes: callers, whose jobs they see, and transactions."""

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

#: How long Postgres may take for what a person waits for.
_MOST_SECONDS = 30.0
SECURITY: dict[str, Any] = {"security": [{"bearer": []}]}


class Problem(BaseModel):
    """What went wrong, by RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    #: The field of the request that is wrong, with which the detail begins. An extension of the RFC's members.
    field: str | None = None


_MEANINGS = {
    400: "The request can't be carried out as it was made.",
    401: "No live key.",
    403: "An admin's key is needed.",
    404: "There is none.",
    408: "The rest of the body didn't come; try again.",
    409: "Its state doesn't allow this.",
    413: "The body is too large.",
    422: "The idempotency key was used with another payload.",
    503: "A server that is needed can't be reached; try again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How an OpenAPI description says which problems a route has, besides 401 and 503."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in (401, 503, *statuses)}


Workspace = Annotated[
    str | None,
    Query(max_length=200, pattern="^[^\0]*$", description="Of an admin: only this workspace. Default: all."),
]


async def identify(request: Request, authorization: str | None, *, vectors: bool = False, turns: int = 1) -> Caller:
    """Look up the caller of an Authorization header, and wait for the turn of their workspace.

    Args:
        vectors: they ask for some.
        turns: what the request costs, by the processor's time.

    Raises:
        Unauthorized, InvalidApiKey: nobody that is known.
        ClientDisconnect: as `take_turn` does.
    """
    caller: Caller = await request.app.state.gateway.cache.caller(authorization)
    request.state.caller = caller
    await take_turn(request, caller.workspace_id, vectors=vectors, turns=turns)
    return caller


async def caller_of(request: Request, *, admin: bool = False, vectors: bool = False, turns: int = 1) -> Caller:
    """Return the caller of a request, as `identify` does.

    Raises:
        Forbidden: not an admin, where it must be one.
    """
    caller = await identify(request, request.headers.get("authorization"), vectors=vectors, turns=turns)
    if admin:
        caller.must_be_admin()
    return caller


def workspace_of(request: Request) -> int:
    """The workspace of who asks, as `caller_of` has found: it pays for the question with a place."""
    caller: Caller = request.state.caller
    return caller.workspace_id


async def read_body(request: Request, shape: type[Body]) -> Body:
    """A request's body. As a parameter of the route it would be read before the caller is known.

    Raises:
        InvalidPayload: it isn't of that shape.
    """
    try:
        return shape.model_validate_json(await request.app.state.transfers.body(request, workspace_of(request)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InvalidPayload(f"{where}: {first['msg']}.", param=where) from None


def described(shape: type[BaseModel]) -> dict[str, Any]:
    """How an OpenAPI description shows a route with such a body."""
    content = {"application/json": {"schema": shape.model_json_schema()}}
    return {**SECURITY, "requestBody": {"required": True, "content": content}}


async def ask(request: Request, act: Callable[[Connection], Found]) -> Found:
    """Act in a transaction, beside the event loop, for the caller.

    Raises:
        Busy: other questions took too long.
        UpstreamUnavailable: the database is away.
    """
    found: Found = await request.app.state.database.ask_within(_MOST_SECONDS, act, workspace_of(request))
    return found


def scope_of(connection: Connection, caller: Caller, workspace: str | None) -> int | None:
    """The workspace whose things a caller sees; None: all of them.

    Raises:
        NotFound: it asks for one that isn't its own, or that doesn't exist.
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


async def ask_of_job(
    request: Request,
    job: str,
    act: Callable[[Connection, UUID], Found],
    workspace: str | None = None,
    *,
    changes_ended: bool | None = None,
    caller: Caller | None = None,
) -> Found:
    """Act on a job that the caller sees, by its id, the beginning of it, or its name: an admin's own workspace comes
    before others. `changes_ended`: the act changes a job, one that has ended or one that hasn't. `caller`: who asks, if
    that is known already.

    Raises:
        UnknownJob: it sees none.
        UserError: several could be meant that would be changed.
    """
    asks = caller or await caller_of(request)
    job = as_sent(job)

    def find(connection: Connection) -> UUID:
        scope = scope_of(connection, asks, workspace)
        try:
            return found(connection, scope or asks.workspace_id)
        except UnknownJob:
            if scope is not None:
                raise
            return found(connection, None)

    def found(connection: Connection, scope: int | None) -> UUID:
        if changes_ended is None:
            return status.find_job(connection, scope, job)
        return status.find_job_to_change(connection, scope, job, ended=changes_ended)

    return await ask(request, lambda connection: act(connection, find(connection)))
