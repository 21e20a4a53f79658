"""Overview at `/`: is all well, and if not, why; the last day's throughput; the queue; failures; freshness."""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection
from starlette.responses import RedirectResponse

from pipeline.api.dashboard import drawing, troubles, words
from pipeline.api.dashboard.answer import PageRoute, show
from pipeline.api.dashboard.session import Viewer
from pipeline.db import models, overview, workers

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_HOURS = 24
#: Rows of metered requests are written a little behind their replies.
_LATE = timedelta(minutes=2)
_MOST_SHOWN = 6
_MOST_COLLECTIONS = 100
#: Filters of the list of jobs, which was at this address once.
_OF_JOBS = frozenset({"state", "model", "name", "before"})


class TokensByHour:
    """Cache of the tokens of hours that are over, since a page that asks every other second mustn't sum up a day each
    time."""

    def __init__(self) -> None:
        self._over: dict[int | None, dict[datetime, int]] = {}

    def of_last_day(self, connection: Connection, workspace_id: int | None) -> list[tuple[datetime, int]]:
        """Return the tokens of the hour that it is, and of those before it, oldest first: (beginning, tokens)."""
        now = datetime.now(UTC)
        this = now.replace(minute=0, second=0, microsecond=0)
        hours = [this - timedelta(hours=ago) for ago in reversed(range(_HOURS))]
        known = self._over.get(workspace_id, {})
        read = overview.hourly_tokens(connection, workspace_id, [hour for hour in hours if hour not in known])
        tokens = {hour: known[hour] if hour in known else read.get(hour, 0) for hour in hours}
        over = now - timedelta(hours=1) - _LATE
        self._over[workspace_id] = {hour: number for hour, number in tokens.items() if hour <= over}
        return list(tokens.items())


@router.get("/")
async def show_overview(request: Request) -> Response:
    """Show the overview. An old address of a filtered list of jobs leads to the list."""
    if _OF_JOBS & request.query_params.keys():
        return RedirectResponse(f"/jobs?{request.url.query}", 308)
    return await show(request, "overview.html", partial(_overview, tokens=request.app.state.tokens_by_hour))


def _overview(connection: Connection, viewer: Viewer, *, tokens: TokensByHour) -> dict[str, Any]:
    waiting = overview.waiting(connection, viewer.scope)
    failed = overview.failed_today(connection, viewer.scope, _MOST_SHOWN)
    collections = overview.freshness(connection, viewer.scope, _MOST_COLLECTIONS)
    visible = {row["name"] for row in models.listed(connection, viewer.scope)}
    hours = tokens.of_last_day(connection, viewer.scope)
    return {
        "troubles": troubles.find(connection, viewer, waiting, failed, collections, visible),
        "chart": drawing.hours(hours) if any(number for _, number in hours) else None,
        "tokens": sum(number for _, number in hours),
        "queue": [
            {
                "waits": each,
                "time": f"about {words.rough(each.items / each.items_per_second)}" if each.items_per_second else None,
            }
            for each in waiting
        ],
        "failed": failed,
        "failed_jobs": failed[0]["jobs"] if failed else 0,
        "rejected": overview.rejected_today(connection, viewer.scope),
        "lost_claims": overview.lost_claims_today(connection, viewer.scope),
        "collections": collections[:_MOST_SHOWN],
        "more_collections": len(collections) > _MOST_SHOWN,
        "slots": sum(worker["slots"] for worker in workers.live(connection)),
        "live": 2,
    }
