"""Usage at `/api/usage`."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection, RowMapping

from pipeline.api.dependencies import SECURITY, ask, caller_of, problems, scope_of
from pipeline.core.errors import InvalidPayload
from pipeline.db import usage

router = APIRouter(prefix="/api", responses=problems(400, 403, 404, 413), tags=["Administration"])


class UsageRow(BaseModel):
    """Usage of one group."""

    group: str | None = Field(
        description="Null: what has no such value, as a job has no key, and a request neither device nor precision."
    )
    requests: int
    items: int
    prompt_tokens: int
    total_tokens: int
    reused_tokens: int
    truncated: int
    cost: Decimal


class UsageList(BaseModel):
    """Usage of your workspace in a period, by group."""

    begin: datetime
    end: datetime
    by: str
    data: list[UsageRow]


@router.get("/usage", openapi_extra=SECURITY)
async def get_usage(
    request: Request,
    by: Annotated[Literal["day", "model", "key", "job", "device", "precision", "label"], Query()] = "day",
    label: Annotated[
        str | None, Query(max_length=100, pattern="^[^\0]*$", description="With by=label: the label's name.")
    ] = None,
    begin: Annotated[datetime | None, Query(description="Default: 30 days ago.")] = None,
    end: Annotated[datetime | None, Query(description="Default: now.")] = None,
    workspace: Annotated[
        str | None, Query(max_length=200, pattern="^[^\0]*$", description="For admins: another workspace's.")
    ] = None,
) -> UsageList:
    """Return tokens and cost of your workspace, by day, model, key, job, device, precision or label."""
    caller = await caller_of(request)
    if by == "label" and label is None:
        raise InvalidPayload("label: by=label needs label=NAME.", param="label")
    until = _utc(end) or datetime.now(UTC)
    since = _utc(begin) or until - timedelta(days=min(30, max(0, until.toordinal() - 1)))

    def act(connection: Connection) -> list[RowMapping]:
        scope = scope_of(connection, caller, workspace) if workspace else None
        return usage.grouped(connection, scope or caller.workspace_id, by, label=label, begin=since, end=until)

    rows = await ask(request, act)
    return UsageList(begin=since, end=until, by=by, data=[UsageRow(**row) for row in rows])


def _utc(moment: datetime | None) -> datetime | None:
    """Return a moment with a zone: UTC if it has none."""
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
