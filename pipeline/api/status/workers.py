"""Workers and engines at `/api/workers`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from pipeline.api.dependencies import SECURITY, ask, caller_of, problems
from pipeline.db import engines, models, workers

router = APIRouter(prefix="/api", responses=problems(400, 404), tags=["Fleet"])

#: Silence after which an engine counts as gone.
_ENGINE_SILENT_SECONDS = 30.0


class Worker(BaseModel):
    """Celery worker."""

    id: UUID
    name: str | None = Field(description="Its name in Celery and Flower.")
    host: str
    device: str
    device_kinds: list[str] = Field(description="Kind of each of its devices: cpu, mps, or a GPU's name.")
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
