"""Overview at `/`: is all well, and if not, why; the last day's throughput; the queue; failures; freshness."""

from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic
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
#: Hours that may still grow are read again from time to time: requests are metered behind their replies, much so after
#: the database was away.
_GROWS = timedelta(hours=2)
_AGAIN_SECONDS = 60.0
_MOST_SHOWN = 6
_MOST_COLLECTIONS = 100
#: Filters of the list of jobs, which was at this address once.
_OF_JOBS = frozenset({"state", "model", "name", "before"})


class TokensByHour:
    """Cache of the tokens of the last day's hours, since a page that asks every other second mustn't sum up a day."""

    def __init__(self) -> None:
        #: Workspace → beginning of an hour → its tokens, and when they were read by the monotonic clock.
        self._read: dict[int | None, dict[datetime, tuple[int, float]]] = {}

    def of_last_day(self, connection: Connection, workspace_id: int | None) -> list[tuple[datetime, int]]:
        """Return the tokens of the hour that it is, and of those before it, oldest first: (beginning, tokens)."""
        this = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        hours = [this - timedelta(hours=ago) for ago in reversed(range(_HOURS))]
        # Kept hour by hour, so that a visit that takes too long for a day of millions of rows helps the next one.
        known = self._read.setdefault(workspace_id, {})
        for hour in known.keys() - set(hours):
            known.pop(hour, None)  # another visit's thread may have been faster
        tokens = list[tuple[datetime, int]]()
        for hour in hours:
            kept = known.get(hour)
            if kept is None or (this - hour <= _GROWS and monotonic() - kept[1] >= _AGAIN_SECONDS):
                kept = known[hour] = (overview.tokens_of_hour(connection, workspace_id, hour), monotonic())
            tokens.append((hour, kept[0]))
        return tokens


@router.get("/")
async def show_overview(request: Request) -> Response:
    """Show the overview. An old address of a filtered list of jobs leads to the list."""
    if _OF_JOBS & request.query_params.keys():
        return RedirectResponse(f"/jobs?{request.url.query}", 308)
    return await show(request, "overview.html", partial(_overview, tokens=request.app.state.tokens_by_hour))


def _overview(connection: Connection, viewer: Viewer, *, tokens: TokensByHour) -> dict[str, Any]:
    waiting = overview.waiting(connection, viewer.scope)
    failures = overview.failures_today(connection, viewer.scope, _MOST_SHOWN)
    collections = overview.freshness(connection, viewer.scope, _MOST_COLLECTIONS)
    visible = {row["name"] for row in models.listed(connection, viewer.scope)}
    hours = tokens.of_last_day(connection, viewer.scope)
    return {
        "troubles": troubles.find(connection, viewer, waiting, failures.jobs, collections, visible),
        "chart": drawing.hours(hours) if any(number for _, number in hours) else None,
        "tokens": sum(number for _, number in hours),
        "queue": [
            {
                "waits": each,
                "time": f"about {words.rough(each.items / each.items_per_second)}" if each.items_per_second else None,
            }
            for each in waiting
        ],
        "failures": failures,
        "most_ended": overview.NEWEST_ENDED,
        "lost_claims": overview.lost_claims_today(connection, viewer.scope),
        "collections": collections[:_MOST_SHOWN],
        "more_collections": len(collections) > _MOST_SHOWN,
        "slots": sum(worker["slots"] for worker in workers.live(connection)),
        "live": 2,
    }
