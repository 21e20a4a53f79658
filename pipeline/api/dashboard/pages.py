"""Pages of workers and engines, models, and usage."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, RowMapping

from pipeline.api.dashboard import drawing
from pipeline.api.dashboard.answer import PageRoute, show
from pipeline.api.dashboard.session import Viewer
from pipeline.db import dashboard, engines, models, workers

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_MOST_GROUPS = 100
#: Silence up to which a worker is still shown, so that its operator sees that it has gone.
_WORKERS_SECONDS = 900.0
_ENGINE_SECONDS = 60.0
_ENGINE_SILENT_SECONDS = 10.0


@router.get("/workers")
async def show_workers(request: Request) -> Response:
    """Show workers and engines."""
    return await show(request, "workers.html", _workers)


def _workers(connection: Connection, viewer: Viewer) -> dict[str, Any]:
    now = datetime.now(UTC)
    visible = _visible(connection, viewer)
    busy = dashboard.busy_slots(connection)
    return {
        "workers": [
            {
                **row,
                "models": [name for name in row["models"] if name in visible],
                "dropped": {name: why for name, why in row["dropped"].items() if name in visible},
                "busy": busy.get(row["id"], 0),
                "silent": is_silent(row, now, workers.SEEN_SECONDS),
            }
            for row in workers.live(connection, _WORKERS_SECONDS)
        ],
        "engines": [
            {
                **row,
                "every": not row["models"],
                "models": [name for name in row["models"] if name in visible],
                "silent": is_silent(row, now, _ENGINE_SILENT_SECONDS),
            }
            for row in engines.live(connection, _ENGINE_SECONDS)
        ],
        "live": 1,
    }


def _catalogue(connection: Connection, viewer: Viewer) -> Sequence[RowMapping]:
    return models.listed(connection, viewer.scope)


def _visible(connection: Connection, viewer: Viewer) -> set[str]:
    return {row["name"] for row in _catalogue(connection, viewer)}


def is_silent(row: RowMapping, now: datetime, seconds: float) -> bool:
    """Return True if a process was last seen more than so many seconds ago."""
    return bool(row["seen_at"] < now - timedelta(seconds=seconds))


@router.get("/models")
async def show_models(request: Request) -> Response:
    """Show the models of the catalogue that the viewer may use."""
    return await show(request, "models.html", _models)


def _models(connection: Connection, viewer: Viewer) -> dict[str, Any]:
    serving = workers.live(connection)
    answering = engines.live(connection, _ENGINE_SILENT_SECONDS)
    return {
        "models": [
            {
                **row,
                "workers": sum(row["name"] in worker["models"] for worker in serving),
                "dropped_by": sum(row["name"] in worker["dropped"] for worker in serving),
                # An engine that names no model serves every local one.
                "engines": sum(
                    row["name"] in engine["models"] or (not engine["models"] and row["kind"] == "local")
                    for engine in answering
                ),
            }
            for row in _catalogue(connection, viewer)
        ],
        "live": 5,
    }


@router.get("/usage")
async def show_usage(
    request: Request,
    by: Literal["day", "model", "key", "job", "device", "workspace"] = "day",
    days: Annotated[int, Query(ge=1, le=366)] = 30,
) -> Response:
    """Show tokens and cost by day, model, key, job, kind of device or workspace."""
    return await show(request, "usage.html", partial(_usage, by=by, days=days))


def _usage(connection: Connection, viewer: Viewer, *, by: str, days: int) -> dict[str, Any]:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    begin = today - timedelta(days=days - 1)
    rows, groups = dashboard.usage(connection, viewer.scope, by, begin, days if by == "day" else _MOST_GROUPS)
    if by == "day":
        rows = sorted(rows, key=lambda row: row["group"], reverse=True)
    names = [f"{begin + timedelta(days=at):%Y-%m-%d}" for at in range(days)]
    return {
        "by": by,
        "days": days,
        "rows": rows,
        "hidden": groups - len(rows),
        "chart": drawing.days(rows, names) if by == "day" else None,
        "most": max((row["total_tokens"] for row in rows), default=0),
        "tokens": sum(row["total_tokens"] for row in rows),
        "items": sum(row["items"] for row in rows),
        "requests": sum(row["requests"] for row in rows),
        # None if no model that was used has a price.
        "cost": sum(costs) if (costs := [row["cost"] for row in rows if row["cost"] is not None]) else None,
        "live": 10,
    }
