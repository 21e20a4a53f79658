"""Key management for the viewer's workspace: an admin lists, creates, rotates and revokes keys."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, act, render, show
from pipeline.api.dashboard.session import Viewer
from pipeline.api.dependencies import ask
from pipeline.catalog import keys
from pipeline.catalog.keys import NewKey
from pipeline.core.errors import InvalidPayload
from pipeline.db import dashboard
from pipeline.db import keys as stored_keys

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_OVERLAP = timedelta(hours=24)
_MOST_NAME = 100
_MOST_DAYS = 3_650


@router.get("/keys")
async def show_keys(request: Request) -> Response:
    """Show the keys of the viewer's workspace; to viewers who aren't admins, only their own."""
    return await show(request, "keys.html", _keys)


def _keys(connection: Connection, viewer: Viewer) -> dict[str, Any]:
    rows = stored_keys.every(connection, viewer.caller.workspace_id) if viewer.caller.admin else []
    return {"keys": rows, "mine": viewer.caller.key_id, "live": 10}


@router.post("/keys")
async def make_key(request: Request) -> Response:
    """Create a key, and show it this once."""
    fields = await session.form(request)
    viewer = await _admin(request)
    name, lives = _name(fields.get("name", "")), _lives(fields.get("days", ""))
    admin = fields.get("admin") == "yes"
    return await _made(
        request, viewer, lambda c: keys.create(c, viewer.caller.workspace_id, name, admin=admin, lives=lives)
    )


@router.post("/keys/{key_id}/rotate")
async def rotate_key(request: Request, key_id: str) -> Response:
    """Create a key that replaces another one, which ends a day later."""
    await session.form(request)
    viewer = await _admin(request)
    return await _made(request, viewer, lambda c: keys.rotate(c, viewer.caller.workspace_id, key_id, _OVERLAP))


@router.post("/keys/{key_id}/revoke")
async def revoke_key(request: Request, key_id: str) -> Response:
    """Revoke a key."""

    def do(connection: Connection, viewer: Viewer, _fields: dict[str, str]) -> str:
        viewer.caller.must_be_admin()
        keys.revoke(connection, viewer.caller.workspace_id, key_id)
        return "/keys"

    return await act(request, do)


async def _admin(request: Request) -> Viewer:
    viewer = await session.viewer(request)
    viewer.caller.must_be_admin()
    return viewer


async def _made(request: Request, viewer: Viewer, make: Callable[[Connection], NewKey]) -> Response:
    """Create a key and answer with the page that shows it. Reloading or polling can't show it again."""

    def run(connection: Connection) -> tuple[NewKey, Any]:
        return make(connection), dashboard.key_holder(connection, viewer.caller.key_id)

    made, holder = await ask(request, run)
    return render(request, "new_key.html", viewer=viewer, holder=holder, made=made)


def _name(given: str) -> str:
    if not 1 <= len(given) <= _MOST_NAME:
        raise InvalidPayload(f"A key needs a name of 1 to {_MOST_NAME} characters, so that it can be told from others.")
    return given


def _lives(given: str) -> timedelta | None:
    if not given:
        return None
    if not given.isdecimal() or not 1 <= int(given) <= _MOST_DAYS:
        raise InvalidPayload(f"A key ends after 1 to {_MOST_DAYS:,} days, or never if the field is empty.")
    return timedelta(days=int(given))
