"""Management of API keys at `/api/keys`, for admins."""

from datetime import datetime, timedelta

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from pipeline.api.dependencies import SECURITY, ask, caller_of, described, problems, read_body
from pipeline.api.paths import as_sent
from pipeline.catalog import keys
from pipeline.core.errors import NotFound, UserError
from pipeline.db import keys as stored_keys

router = APIRouter(prefix="/api", responses=problems(400, 403, 404, 413), tags=["Administration"])


class KeyWish(BaseModel):
    """Key to create."""

    name: str = Field(min_length=1, max_length=100, pattern="^[^\0]*$")
    admin: bool = False
    expires_in_days: float | None = Field(default=None, gt=0, le=3_650)


class Rotation(BaseModel):
    """Rotation of a key: the time for which the old key stays valid."""

    overlap_hours: float = Field(default=24, ge=0, le=24 * 90)


class MadeKey(BaseModel):
    """New key. Its token is shown only this once."""

    id: str
    token: str


class Key(BaseModel):
    """Key of your workspace."""

    id: str
    name: str
    admin: bool
    live: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@router.get("/keys", openapi_extra=SECURITY)
async def list_keys(request: Request) -> list[Key]:
    """List the keys of your workspace, without their secrets. Needs an admin's key."""
    caller = await caller_of(request, admin=True)
    rows = await ask(request, lambda c: stored_keys.every(c, caller.workspace_id))
    return [Key(**row) for row in rows]


@router.post("/keys", status_code=201, openapi_extra=described(KeyWish))
async def create_key(request: Request) -> MadeKey:
    """Create a key. Needs an admin's key."""
    caller = await caller_of(request, admin=True)
    wish = await read_body(request, KeyWish)
    lives = None if wish.expires_in_days is None else timedelta(days=wish.expires_in_days)
    made = await ask(request, lambda c: keys.create(c, caller.workspace_id, wish.name, admin=wish.admin, lives=lives))
    return MadeKey(id=made.id, token=made.token)


@router.post("/keys/{key_id}/rotate", status_code=201, openapi_extra=described(Rotation))
async def rotate_key(request: Request, key_id: str) -> MadeKey:
    """Create a key that replaces another one and has the old key's lifetime. Needs an admin's key."""
    caller = await caller_of(request, admin=True)
    overlap = timedelta(hours=(await read_body(request, Rotation)).overlap_hours)
    try:
        made = await ask(request, lambda c: keys.rotate(c, caller.workspace_id, _id(key_id), overlap))
    except UserError as error:
        raise NotFound(str(error)) from error
    return MadeKey(id=made.id, token=made.token)


@router.delete("/keys/{key_id}", status_code=204, openapi_extra=SECURITY)
async def revoke_key(request: Request, key_id: str) -> None:
    """Revoke a key. It stops working within two seconds. Needs an admin's key."""
    caller = await caller_of(request, admin=True)
    try:
        await ask(request, lambda c: keys.revoke(c, caller.workspace_id, _id(key_id)))
    except UserError as error:
        raise NotFound(str(error)) from error


def _id(given: str) -> str:
    return as_sent(given).replace("\0", "")
