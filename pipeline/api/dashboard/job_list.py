"""Page of jobs, with filters that live in its address: state, model, label, date and a part of the name."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlencode
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from pipeline.api.dashboard.answer import PageRoute, show
from pipeline.api.dashboard.session import Viewer
from pipeline.core.errors import UserError
from pipeline.core.job_status import JobStatus
from pipeline.core.jobs import JobState
from pipeline.db import dashboard, jobs
from pipeline.jobs import status

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_PAGE = 25
#: Labels of the jobs on a page that are offered as filters.
_MOST_LABELS = 12
_MOST_CHARACTERS = 1_000
#: Days back from today, today included, that are offered as filters.
_DAYS = (1, 7, 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Filters of the list, which combine. An empty one lets every job through."""

    state: JobState | None = None
    model: str = ""
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: First and last day on which a job was made, UTC.
    since: date | None = None
    until: date | None = None

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Names and values of the filters that are set, as an address has them."""
        one_each = {"state": self.state, "model": self.model, "name": self.name}
        dates = {"since": self.since, "until": self.until}
        return [
            *((name, str(value)) for name, value in one_each.items() if value),
            *(("label", _written(*label)) for label in self.labels.items()),
            *((name, str(value)) for name, value in dates.items() if value),
        ]

    def address(self, before: UUID | None = None, **changes: Any) -> str:
        """Return the address of the list with some filters changed; `before`: the job after which it begins."""
        cursor = [("before", str(before))] if before else []
        query = urlencode([*replace(self, **changes).fields, *cursor], safe=":/", quote_via=quote)
        return f"/jobs?{query}" if query else "/jobs"

    def toggled(self, key: str, value: str) -> str:
        """Return the address with a label among the filters, or without it if it is one of them."""
        others = {name: kept for name, kept in self.labels.items() if name != key}
        return self.address(labels=others if self.labels.get(key) == value else {**others, key: value})

    @property
    def wanted(self) -> dict[str, Any]:
        """The filters as `db.jobs` takes them, without the state and the model."""
        return {
            "name": self.name or None,
            "labels": self.labels,
            "since": _midnight(self.since) if self.since else None,
            "until": _midnight(self.until) + timedelta(days=1) if self.until else None,
        }


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _written(key: str, value: str) -> str:
    """Write a label for an address. The first colon ends its name, so one within the name is encoded."""
    return f"{key.replace('%', '%25').replace(':', '%3A')}:{value}"


def _read(asked: Mapping[str, str], labels: list[str]) -> Filters:
    """Read the filters of an address.

    Raises:
        UserError: a value can't be one of its filter.
    """
    for name, value in [*asked.items(), *(("label", label) for label in labels)]:
        if len(value) > _MOST_CHARACTERS or "\0" in value:
            raise UserError(f"give at most {_MOST_CHARACTERS:,} characters, none of them NUL.", field=name)
    return Filters(
        state=_state(asked["state"]),
        model=asked["model"],
        name=asked["name"].strip(),
        labels=_labels(labels),
        since=_date("since", asked["since"]),
        until=_date("until", asked["until"]),
    )


def _state(given: str) -> JobState | None:
    if given and given not in list(JobState):
        raise UserError(f"a job's state is one of {', '.join(JobState)}.", field="state", given=f'"{given}"')
    return JobState(given) if given else None


def _label(given: str) -> tuple[str, str]:
    key, colon, value = given.partition(":")
    if not colon:
        raise UserError("write a label as name:value, such as team:search.", field="label", given=f'"{given}"')
    return unquote(key), value


def _labels(given: list[str]) -> dict[str, str]:
    found = dict[str, str]()
    for key, value in map(_label, given):
        if found.setdefault(key, value) != value:
            raise UserError("a job has one value of a label; ask for one.", field="label", given=f'"{key}"')
    return found


def _date(name: str, given: str) -> date | None:
    try:
        found = date.fromisoformat(given) if given else None
    except ValueError:
        found = date.max
    if found == date.max:  # which has no next day, either
        raise UserError("write a date such as 2026-11-01.", field=name, given=f'"{given}"')
    return found


def _cursor(given: str) -> UUID | None:
    try:
        return UUID(given) if given else None
    except ValueError:
        raise UserError(
            "it is no id of a job; follow the list's own links.", field="before", given=f'"{given}"'
        ) from None


@router.get("/jobs")
async def show_jobs(
    request: Request,
    state: str = "",
    model: str = "",
    name: str = "",
    label: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006 - FastAPI copies it
    since: str = "",
    until: str = "",
    before: str = "",
) -> Response:
    """Show jobs, newest first."""
    asked = {"state": state, "model": model, "name": name, "since": since, "until": until}
    look = partial(_jobs, asked=_read(asked, label), before=_cursor(before))
    return await show(request, "jobs.html", look)


def _jobs(connection: Connection, viewer: Viewer, *, asked: Filters, before: UUID | None) -> dict[str, Any]:
    states = [asked.state] if asked.state else []
    found = status.list_jobs(
        connection,
        viewer.scope,
        states=states,
        model=asked.model or None,
        before=before,
        limit=_PAGE + 1,
        **asked.wanted,
    )
    by_state, by_model = Counter[str](), Counter[str]()
    for of_state, of_model, count in jobs.count(connection, viewer.scope, **asked.wanted):
        by_state[of_state] += count if asked.model in ("", of_model) else 0
        by_model[of_model] += count if asked.state in (None, of_state) else 0
    shown = found[:_PAGE]
    today = datetime.now(UTC).date()
    return {
        "jobs": shown,
        "positions": dashboard.queue_positions(connection, [job.id for job in shown]),
        "more": shown[-1].id if len(found) > _PAGE else None,
        "by_state": {each.value: by_state[each] for each in JobState if by_state[each] or each == asked.state},
        "by_model": dict(by_model),
        "labels": _offered(asked, shown),
        "days": {days: today - timedelta(days=days - 1) for days in _DAYS},
        "asked": asked,
        "before": before,
        # A job may be submitted at any moment.
        "live": 1,
    }


def _offered(asked: Filters, shown: list[JobStatus]) -> list[tuple[str, str]]:
    """Return the labels that are offered as filters: those that are set, and the most frequent ones on the page."""
    frequent = Counter(label for job in shown for label in job.labels.items() if label not in asked.labels.items())
    return [*asked.labels.items(), *sorted(label for label, _ in frequent.most_common(_MOST_LABELS))]
