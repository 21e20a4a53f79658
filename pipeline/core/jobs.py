"""Jobs: what one is, its states, and which of their transitions are legal."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from pipeline.core.options import KeptOptions


class JobState(enum.StrEnum):
    """Where a job stands. `PAUSED` carries a reason, `FAILED` too."""

    STAGING = "staging"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen unless a person asks for it."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


#: Legal moves of a job. A job that fails passes through `CANCELLING` while its chunks are drained, unless
#: none is open; `retry` reopens a completed or a failed one.
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.STAGING: frozenset({JobState.QUEUED}),
    JobState.QUEUED: frozenset(
        {JobState.RUNNING, JobState.PAUSED, JobState.CANCELLING, JobState.COMPLETED, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset({JobState.PAUSED, JobState.CANCELLING, JobState.COMPLETED, JobState.FAILED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLING, JobState.COMPLETED, JobState.FAILED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.FAILED}),
    JobState.COMPLETED: frozenset({JobState.QUEUED}),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset(),
}


class Reason(enum.StrEnum):
    """Why a job is paused or has failed."""

    BY_USER = "by_user"
    WORKERS_FAILING = "workers_failing"
    MODEL_CANNOT_LOAD = "model_cannot_load"
    SOURCE_CHANGED = "source_changed"
    SOURCE_DAMAGED = "source_damaged"
    STORAGE_REFUSED = "storage_refused"
    TABLE_REFUSED = "table_refused"
    KEY_REFUSED = "key_refused"
    BUDGET_SPENT = "budget_spent"
    GATEWAY_REFUSED = "gateway_refused"
    ALL_REJECTED = "all_rejected"
    TOO_MANY_REJECTS = "too_many_rejects"
    ITEMS_UNACCOUNTED = "items_unaccounted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A corpus to embed with one model, as its row stands."""

    id: UUID
    workspace_id: int
    name: str
    #: Its name.
    model: str
    vector_space_id: int
    state: JobState
    #: Why it is paused or has failed: one of `Reason`, or an older version's.
    reason: str | None
    message: str | None
    #: What it becomes when its last chunk is drained, while it is `CANCELLING`.
    ends_as: JobState | None
    priority: int
    labels: Mapping[str, str]
    options: KeptOptions
    idempotency_key: str | None
    payload_sha256: str | None
    #: Of the producer that stages it.
    fence: int
    token: UUID | None
    items_total: int
    max_rejects: int | None
    #: What its sender should know of its rows, a line each.
    notices: Sequence[str]
    #: Its account, frozen when it ended.
    receipt: Mapping[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    texts_removed_at: datetime | None
    #: Texts of items below this index are gone.
    texts_kept_from: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveJob:
    """A job that has been queued and hasn't ended, as the dispatcher looks at it."""

    id: UUID
    state: JobState
    model: str
    workspace_id: int
    #: Of its workspace, among others.
    weight: float
    priority: int
    max_rejects: int | None

    @property
    def is_runnable(self) -> bool:
        """Return whether its chunks may be claimed."""
        return self.state in (JobState.QUEUED, JobState.RUNNING)
