"""History of a job as its page tells it: who submitted it, then what became of it, with the claims that it lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from sqlalchemy import Connection, RowMapping

from pipeline.api.dashboard import words
from pipeline.core.jobs import Job, JobState, Reason
from pipeline.db import dashboard, job_history

_MOST_ENTRIES, _MOST_LOSSES = 60, 20
_ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Event:
    """Event of a job's history."""

    at: datetime
    #: Name of its icon: a job's state, or `warning`.
    kind: str
    told: str
    detail: str | None = None
    query: str | None = None


def of_job(connection: Connection, job: Job) -> list[Event]:
    """Return the events of a job in order; none of a job from before there were histories."""
    entries = job_history.read(connection, job.id, _MOST_ENTRIES)
    losses = job_history.lost_claims(connection, job.id, job.model, job.created_at, _MOST_LOSSES)
    return sorted([*_changes(connection, entries), *map(_lost, losses)], key=lambda event: event.at)


def _changes(connection: Connection, entries: Sequence[RowMapping]) -> Iterator[Event]:
    for entry in entries[:1]:
        if entry["state"] == JobState.STAGING:
            by = entry["submitted_by"]
            told = f"Submitted by {_named(connection, by)}" if by else "Submitted"
            yield Event(entry["changed_at"], JobState.STAGING, told, query=entry["query"])
        else:  # of an older version, or its beginning was long ago
            yield Event(entry["changed_at"], entry["state"], _told(None, entry), _detail(entry))
    for before, entry in pairwise(entries):
        if hidden := entry["number"] - before["number"] - 1:
            yield Event(entry["changed_at"], "waiting", f"{words.count(hidden, 'change')} before this one")
        if entry["priority"] != before["priority"]:
            told = f"Priority {entry['priority']}, before {before['priority']}"
            yield Event(entry["changed_at"], JobState.QUEUED, told)
        if entry["state"] != before["state"]:
            yield Event(entry["changed_at"], entry["state"], _told(before["state"], entry), _detail(entry))


def _named(connection: Connection, submitter: str) -> str:
    """Return a submitter with the name of their key, if it is one."""
    kind, _, key_id = submitter.partition(" ")
    holder = dashboard.key_holder(connection, key_id) if kind == "key" else None
    return f"key {holder['name']}" if holder else submitter


def _told(before: str | None, entry: RowMapping) -> str:
    state, why = JobState(entry["state"]), words.reason(entry["reason"])[0]
    match state:
        case JobState.QUEUED if before == JobState.PAUSED:
            return "Resumed"
        case JobState.QUEUED if before in _ENDED:
            return "Retried"
        case JobState.RUNNING:
            return "A worker took its first chunk" if before == JobState.QUEUED else "Running"
    return f"{state.value.capitalize()}: {why}" if why else state.value.capitalize()


def _detail(entry: RowMapping) -> str | None:
    """Return an entry's message, unless its reason says as much."""
    return None if entry["reason"] == Reason.BY_USER else entry["message"]


def _lost(loss: RowMapping) -> Event:
    return Event(loss["lost_at"], "warning", f"{words.count(loss['claims'], 'claim')} lost", loss["cause"])
