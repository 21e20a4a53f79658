"""Requests to forget keys at `/api/forgets`."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection, Engine

from pipeline.api.dependencies import SECURITY, ask, caller_of, described, problems, read_body
from pipeline.api.paths import as_sent
from pipeline.api.status.collections import Of, scope_or_own
from pipeline.core.errors import UnknownForget
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.options import Word
from pipeline.db.collections import Collection
from pipeline.jobs import forgetting
from pipeline.jobs.collections import find_collection

router = APIRouter(prefix="/api/forgets", responses=problems(400, 404, 413), tags=["Collections"])

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


@router.post("", status_code=201, openapi_extra=described(ForgetRequest))
async def forget(request: Request, workspace: Of = None) -> ForgetStatus:
    """Forget keys: from now on rows with such a key are rejected, and the dispatcher erases what is there.

    Parquet files and files of batch requests aren't changed; the answer names them.
    """
    caller = await caller_of(request)
    wish = await read_body(request, ForgetRequest)

    def act(engine: Engine) -> ForgetStatus:
        with engine.begin() as connection:
            scope = scope_or_own(connection, caller, workspace)
            found = _collection(connection, scope, wish.collection)
        by = f"key {caller.key_id}"
        made = forgetting.forget_keys(engine, scope, wish.keys, by=by, collection=found)
        with engine.begin() as connection:
            return forgetting.forget_status(connection, scope, made)

    return await request.app.state.transfers.run(caller.workspace_id, act)


@router.post("/allow", openapi_extra=described(ForgetRequest))
async def allow(request: Request, workspace: Of = None) -> Allowed:
    """Let forgotten keys come in again. What was erased isn't brought back."""
    caller = await caller_of(request)
    wish = await read_body(request, ForgetRequest)

    def act(engine: Engine) -> Allowed:
        with engine.begin() as connection:
            scope = scope_or_own(connection, caller, workspace)
            found = _collection(connection, scope, wish.collection)
        return Allowed(allowed=forgetting.allow_keys(engine, scope, wish.keys, collection=found))

    return await request.app.state.transfers.run(caller.workspace_id, act)


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


def _collection(connection: Connection, scope: int, name: str | None) -> Collection | None:
    return None if name is None else find_collection(connection, scope, name)
