"""Fleet and catalogue at `/api/workers` and `/api/models`: workers, engines and models."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from pipeline.api.dependencies import SECURITY, Workspace, ask, caller_of, problems, scope_of
from pipeline.db import engines, models, workers

router = APIRouter(prefix="/api", responses=problems(400, 404), tags=["Fleet"])

#: Silence after which an engine counts as gone.
_ENGINE_SILENT_SECONDS = 30.0


class Worker(BaseModel):
    """Celery worker."""

    id: UUID
    host: str
    device: str
    models: list[str]
    dropped: dict[str, str] = Field(description="Models that it dropped, each with the reason.")
    slots: int
    resting: str | None = Field(description="Reason why it takes no chunks at the moment.")
    started_at: datetime
    seen_at: datetime


class ServingEngine(BaseModel):
    """Engine, which serves local models to the api."""

    id: UUID
    device: str
    models: list[str]
    started_at: datetime
    seen_at: datetime


class Fleet(BaseModel):
    """Workers and engines that were seen within the last half minute."""

    workers: list[Worker]
    engines: list[ServingEngine]


class CatalogueModel(BaseModel):
    """Model of the catalogue that your workspace may use; with an admin's key, any model."""

    name: str
    kind: str = Field(description="local or gateway.")
    aliases: list[str]
    dimensions: int
    matryoshka: list[int] = Field(description="Sizes to which its vectors may be shortened.")
    max_item_tokens: int | None
    tokens_per_second: float = Field(description="Measured on one slot.")
    price_per_million: float | None
    added_at: datetime


class Catalogue(BaseModel):
    """Models by name."""

    data: list[CatalogueModel]


@router.get("/workers", openapi_extra=SECURITY)
async def list_workers(request: Request) -> Fleet:
    """List live workers and engines. Models that your workspace may not use are left out of their lists of models."""
    caller = await caller_of(request)

    def act(connection: Connection) -> tuple[list[Any], list[Any], set[str]]:
        usable = models.every(connection) if caller.admin else models.of_workspace(connection, caller.workspace_id)
        names = {row["name"] for row in usable}
        return workers.live(connection), engines.live(connection, _ENGINE_SILENT_SECONDS), names

    working, serving, names = await ask(request, act)
    return Fleet(
        workers=[Worker(**_only(row, names)) for row in working],
        engines=[ServingEngine(**_only(row, names)) for row in serving],
    )


def _only(row: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    shown = dict(row)
    shown["models"] = [name for name in shown["models"] if name in names]
    if "dropped" in shown:
        shown["dropped"] = {name: why for name, why in shown["dropped"].items() if name in names}
    return shown


@router.get("/models", openapi_extra=SECURITY)
async def list_catalogue(request: Request, workspace: Workspace = None) -> Catalogue:
    """List the models that your workspace may use; an admin's key sees the whole catalogue."""
    caller = await caller_of(request)

    def act(connection: Connection) -> list[Any]:
        scope = scope_of(connection, caller, workspace)
        return models.every(connection) if scope is None else models.of_workspace(connection, scope)

    return Catalogue(data=[CatalogueModel(**row) for row in await ask(request, act)])
