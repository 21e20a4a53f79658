"""Requests to forget keys at `/api/forgets`."""

from collections.abc import Callable
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection, Engine

from pipeline.api.dependencies import SECURITY, ask, caller_of, described, problems, read_body, scope_or_own
from pipeline.api.gateway.cache import Caller
from pipeline.api.paths import as_sent
from pipeline.api.status.collections import Of
from pipeline.api.transfers import Transfers
from pipeline.core.errors import UnknownForget
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.options import Word
from pipeline.db.collections import Collection
from pipeline.jobs import forgetting
from pipeline.jobs.collections import find_collection

router = APIRouter(prefix="/api/forgets", responses=problems(400, 404, 413), tags=["Collections"])

Found = TypeVar("Found")
_Key = Annotated[str, StringConstraints(min_length=1, max_length=1_024, pattern="^[^\0]*$")]


class ForgetRequest(BaseModel):
    """Request to forget keys, or to allow forgotten ones again."""

    model_config = ConfigDict(extra="forbid")

    keys: list[_Key] = Field(min_length=1, max_length=100_000, description="The keys.")
    collection: Word | None = Field(
        default=None, description="Only in this collection and its syncs. Default: in all of the workspace."
    )


class Allowed(BaseModel):
    """Result of allowing keys again."""

    allowed: int = Field(description="Keys of these that were forgotten.")


#: Acts on the keys of a workspace, or of one of its collections.
_Act = Callable[[Engine, int, Collection | None], Found]


@router.post("", status_code=201, openapi_extra=described(ForgetRequest))
async def forget(request: Request, workspace: Of = None) -> ForgetStatus:
    """Forget keys: from now on rows with such a key are rejected, and the dispatcher erases what is there.

    Tables that jobs wrote to aren't changed, nor are Parquet files that can't be found any more; the request names them
    once it is finished.
    """
    caller = await caller_of(request)
    wish = await read_body(request, ForgetRequest)

    def act(engine: Engine, scope: int, collection: Collection | None) -> ForgetStatus:
        by = f"key {caller.key_id}"
        made = forgetting.forget_keys(engine, scope, wish.keys, by=by, collection=collection)
        with engine.begin() as connection:
            return forgetting.forget_status(connection, scope, made)

    return await _run(request, caller, workspace, wish, act)


@router.post("/allow", openapi_extra=described(ForgetRequest))
async def allow(request: Request, workspace: Of = None) -> Allowed:
    """Let forgotten keys come in again. What was erased isn't brought back."""
    caller = await caller_of(request)
    wish = await read_body(request, ForgetRequest)

    def act(engine: Engine, scope: int, collection: Collection | None) -> Allowed:
        return Allowed(allowed=forgetting.allow_keys(engine, scope, wish.keys, collection=collection))

    return await _run(request, caller, workspace, wish, act)


async def _run(request: Request, caller: Caller, workspace: str | None, wish: ForgetRequest, act: _Act[Found]) -> Found:
    """Run `act`, which may take long, with the workspace and the collection that a request is about."""

    def run(engine: Engine) -> Found:
        with engine.begin() as connection:
            scope = scope_or_own(connection, caller, workspace)
            found = find_collection(connection, scope, wish.collection) if wish.collection else None
        return act(engine, scope, found)

    transfers: Transfers = request.app.state.transfers
    return await transfers.run(caller.workspace_id, run)


@router.get("/{forget}", openapi_extra=SECURITY)
async def show_forget(request: Request, forget: str, workspace: Of = None) -> ForgetStatus:
    """Show how far a request to forget keys is."""
    caller = await caller_of(request)
    try:
        forget_id = UUID(as_sent(forget))
    except ValueError:
        raise UnknownForget(f'no request "{as_sent(forget)}" to forget keys.') from None

    def act(connection: Connection) -> ForgetStatus:
        return forgetting.forget_status(connection, scope_or_own(connection, caller, workspace), forget_id)

    return await ask(request, act)
