"""Jobs, their states and the legal transitions between them."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from pipeline.core.options import KeptOptions


class JobState(enum.StrEnum):
    """State of a job. `PAUSED` and `FAILED` carry a reason."""

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
        """True if nothing more will happen unless a person asks for it."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


#: Legal transitions of a job. A job that fails passes through `CANCELLING` while its chunks are drained, unless
#: none is open; `retry` reopens a completed or a failed job.
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
    """Reason why a job is paused or has failed."""

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
    SOURCE_EMPTY = "source_empty"
    TOO_MANY_REMOVED = "too_many_removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Row of a job: a corpus to embed with one model."""

    id: UUID
    workspace_id: int
    name: str
    #: Name of the model.
    model: str
    vector_space_id: int
    state: JobState
    #: Reason of the pause or failure: one of `Reason`, or one from an older version.
    reason: str | None
    message: str | None
    #: State that a `CANCELLING` job takes once its last chunk is drained.
    ends_as: JobState | None
    priority: int
    labels: Mapping[str, str]
    options: KeptOptions
    idempotency_key: str | None
    payload_sha256: str | None
    #: Fence of the producer that stages the job.
    fence: int
    token: UUID | None
    items_total: int
    max_rejects: int | None
    #: Notices to the submitter about the rows, one line each.
    notices: Sequence[str]
    #: Account of the job, frozen when it ended.
    receipt: Mapping[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    texts_removed_at: datetime | None
    #: Texts of items below this index aren't kept.
    texts_kept_from: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveJob:
    """Job that has been queued and hasn't ended, as the dispatcher sees it."""

    id: UUID
    name: str
    state: JobState
    model: str
    workspace_id: int
    #: Fair-share weight of the job's workspace.
    weight: float
    priority: int
    max_rejects: int | None

    @property
    def is_runnable(self) -> bool:
        """True if the job's chunks may be claimed."""
        return self.state in (JobState.QUEUED, JobState.RUNNING)
