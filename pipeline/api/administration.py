"""`/api`: usage, and keys for those who may mint them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import Connection

from pipeline import keys
from pipeline.api.database import Database
from pipeline.api.directory import Caller
from pipeline.errors import InvalidPayload, NotFound, UserError
from pipeline.store import keys as stored_keys
from pipeline.store import usage

Found = TypeVar("Found")
Body = TypeVar("Body", bound=BaseModel)

#: A sum over a long time of usage takes its time.
_MOST_SECONDS = 30.0


class Problem(BaseModel):
    """What went wrong, by RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
    for status, text in {
        400: "bad request",
        401: "no live key",
        403: "an admin's key is needed",
        404: "none",
        413: "the body is too large",
        503: "the database is away",
    }.items()
}
router = APIRouter(prefix="/api", responses=_PROBLEMS, tags=["Administration"])
_SECURITY: dict[str, Any] = {"security": [{"bearer": []}]}


class UsageRow(BaseModel):
    """What one group used."""

    group: str | None
    requests: int
    items: int
    prompt_tokens: int
    total_tokens: int
    reused_tokens: int
    truncated: int
    cost: Decimal


class UsageList(BaseModel):
    """Usage of your workspace."""

    begin: datetime
    end: datetime
    by: str
    data: list[UsageRow]


class KeyWish(BaseModel):
    """A key to make."""

    name: str = Field(min_length=1, max_length=100)
    admin: bool = False
    expires_in_days: float | None = Field(default=None, gt=0, le=3_650)


class Rotation(BaseModel):
    """How long the old key stays valid."""

    overlap_hours: float = Field(default=24, ge=0, le=24 * 90)


class MadeKey(BaseModel):
    """A new key. Its token is shown this once."""

    id: str
    token: str


class Key(BaseModel):
    """A key of your workspace."""

    id: str
    name: str
    admin: bool
    live: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


async def _caller(request: Request, *, admin: bool) -> Caller:
    caller: Caller = await request.app.state.gateway.directory.caller(request.headers.get("authorization"))
    if admin:
        caller.must_be_admin()
    return caller


async def _with(request: Request, act: Callable[[Connection], Found]) -> Found:
    """Act in a transaction."""
    database: Database = request.app.state.database
    return await database.ask_within(_MOST_SECONDS, act)


async def _read(request: Request, shape: type[Body]) -> Body:
    """A request's body. A parameter of the route would be read before the caller is known."""
    try:
        return shape.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InvalidPayload(f"{where}: {first['msg']}.", param=where) from None


def _described(shape: type[BaseModel]) -> dict[str, Any]:
    """How the description shows a route with such a body."""
    content = {"application/json": {"schema": shape.model_json_schema()}}
    return {**_SECURITY, "requestBody": {"required": True, "content": content}}


@router.get("/usage", openapi_extra=_SECURITY)
async def get_usage(
    request: Request,
    by: Annotated[Literal["day", "model", "key", "job", "label"], Query()] = "day",
    label: Annotated[
        str | None, Query(max_length=100, pattern="^[^\0]*$", description="For by=label: its name.")
    ] = None,
    begin: Annotated[datetime | None, Query(description="Default: 30 days ago.")] = None,
    end: Annotated[datetime | None, Query(description="Default: now.")] = None,
) -> UsageList:
    """Tokens and cost of your workspace, by day, model, key, job or label."""
    caller = await _caller(request, admin=False)
    if by == "label" and label is None:
        raise InvalidPayload("by=label needs label=NAME.", param="label")
    until = _utc(end) or datetime.now(UTC)
    since = _utc(begin) or until - timedelta(days=min(30, max(0, until.toordinal() - 1)))
    rows = await _with(
        request, lambda c: usage.grouped(c, caller.workspace_id, by, label=label, begin=since, end=until)
    )
    return UsageList(begin=since, end=until, by=by, data=[UsageRow(**row) for row in rows])


def _utc(moment: datetime | None) -> datetime | None:
    """A moment without a zone is UTC."""
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment


@router.get("/keys", openapi_extra=_SECURITY)
async def list_keys(request: Request) -> list[Key]:
    """The keys of your workspace, without their secrets. Needs an admin's key."""
    caller = await _caller(request, admin=True)
    rows = await _with(request, lambda c: stored_keys.every(c, caller.workspace_id))
    return [Key(**row) for row in rows]


@router.post("/keys", status_code=201, openapi_extra=_described(KeyWish))
async def create_key(request: Request) -> MadeKey:
    """Make a key. Needs an admin's key."""
    caller = await _caller(request, admin=True)
    wish = await _read(request, KeyWish)
    lives = None if wish.expires_in_days is None else timedelta(days=wish.expires_in_days)
    name = wish.name.replace("\0", "")
    made = await _with(request, lambda c: keys.create(c, caller.workspace_id, name, admin=wish.admin, lives=lives))
    return MadeKey(id=made.id, token=made.token)


@router.post("/keys/{key_id}/rotate", status_code=201, openapi_extra=_described(Rotation))
async def rotate_key(request: Request, key_id: str) -> MadeKey:
    """Make a key in place of another one, that lives as long. Needs an admin's key."""
    caller = await _caller(request, admin=True)
    overlap = timedelta(hours=(await _read(request, Rotation)).overlap_hours)
    try:
        made = await _with(request, lambda c: keys.rotate(c, caller.workspace_id, _id(key_id), overlap))
    except UserError as error:
        raise NotFound(str(error)) from error
    return MadeKey(id=made.id, token=made.token)


@router.delete("/keys/{key_id}", status_code=204, openapi_extra=_SECURITY)
async def revoke_key(request: Request, key_id: str) -> None:
    """Revoke a key; gateways learn it within two seconds. Needs an admin's key."""
    caller = await _caller(request, admin=True)
    try:
        await _with(request, lambda c: keys.revoke(c, caller.workspace_id, _id(key_id)))
    except UserError as error:
        raise NotFound(str(error)) from error


def _id(given: str) -> str:
    return given.replace("\0", "")
