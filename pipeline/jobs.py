"""Nouns and states: what a job, a chunk and a reject are, and which transitions are legal. No I/O."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from pipeline.options import KeptOptions


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


class ChunkState(enum.StrEnum):
    """Where a chunk stands."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


#: Legal moves of a chunk. `retry` reopens an ended one.
CHUNK_TRANSITIONS: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.PENDING: frozenset({ChunkState.RUNNING, ChunkState.DONE, ChunkState.CANCELLED}),
    ChunkState.RUNNING: frozenset({ChunkState.PENDING, ChunkState.DONE, ChunkState.CANCELLED}),
    ChunkState.DONE: frozenset({ChunkState.PENDING}),
    ChunkState.CANCELLED: frozenset({ChunkState.PENDING}),
}


class RequestState(enum.StrEnum):
    """Where a request in SQL stands. `FAILED` carries a reason; asked for again, it is `REQUESTED` again. `CANCELLED`
    it stays: a person has said so."""

    REQUESTED = "requested"
    #: It is a job by now.
    SUBMITTED = "submitted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestReason(enum.StrEnum):
    """Why a request in SQL has failed before it was a job."""

    EMPTY_SOURCE = "empty_source"
    #: The database refuses the query, or its columns don't serve.
    QUERY_REFUSED = "query_refused"
    #: The query took longer than it may, or somebody ended it in its database.
    QUERY_STOPPED = "query_stopped"
    SOURCE_UNREACHABLE = "source_unreachable"
    #: An option, the model or the idempotency key doesn't fit.
    REQUEST_REFUSED = "request_refused"


class EventState(enum.StrEnum):
    """Where an event for a webhook stands."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class BatchState(enum.StrEnum):
    """Where a batch request stands, in the words of OpenAI's API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


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


class RejectCode(enum.StrEnum):
    """Why an item can't be embedded."""

    MISSING_TEXT = "missing_text"
    NOT_A_STRING = "not_a_string"
    EMPTY_TEXT = "empty_text"
    INVALID_UTF8 = "invalid_utf8"
    NUL_CHARACTER = "nul_character"
    TOO_LARGE = "too_large"
    BAD_KEY = "bad_key"
    BAD_ROW = "bad_row"
    BAD_REQUEST = "bad_request"
    TOO_LONG = "too_long"
    BAD_VECTOR = "bad_vector"
    ENCODE_FAILED = "encode_failed"
    CRASHED_WORKER = "crashed_worker"
    GATEWAY_REFUSED = "gateway_refused"
    GATEWAY_FAILED = "gateway_failed"

    @property
    def retryable(self) -> bool:
        """Whether `retry` may embed the item after all: its text is kept and the cause may have gone."""
        return self in RETRYABLE_REJECTS


RETRYABLE_REJECTS = frozenset(
    {
        RejectCode.BAD_VECTOR,
        RejectCode.ENCODE_FAILED,
        RejectCode.CRASHED_WORKER,
        RejectCode.GATEWAY_REFUSED,
        RejectCode.GATEWAY_FAILED,
    }
)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A contiguous range of a job's items, as its row stands."""

    id: int
    ordinal: int
    first_index: int
    items: int
    state: ChunkState
    #: How often it was claimed, and reopened.
    fence: int
    crashes: int
    last_error: str | None
    embedded: int
    reused: int
    rejected: int
    cancelled: int
    truncated: int
    prompt_tokens: int
    output_uri: str | None
    lease_until: datetime | None
    not_before: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One text of a job, as a worker reads it."""

    #: Zero-based position in the job.
    index: int
    #: The user's key, if the source has one.
    key: str | None
    text: str
    #: A JSON object of the columns that go into the output; empty where none do, or where they stand in Postgres.
    carried: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """An item that can't be embedded."""

    index: int
    key: str | None
    code: RejectCode
    #: What is wrong with the item, for a person; never its text.
    message: str


#: Of one request, by OpenAI's own API.
MOST_INPUTS = 2_048


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Where a model of kind gateway is."""

    #: Of the API, to which `/embeddings` is added.
    url: str
    #: What requests call the model.
    model: str
    #: What replies call it, where that is another name.
    reply_model: str | None
    #: Names the variable with the key; `None`: it asks for none.
    key_env: str | None
    #: Whether it answers base64.
    base64: bool
    #: The most inputs, and about the most tokens, of one request.
    request_inputs: int
    request_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A catalogue entry, as the encoder and the planner need it."""

    name: str
    slug: str
    #: Folder of the weights on a worker, or `None` for a hub id.
    path: str | None
    hub_id: str | None
    revision: str | None
    #: How a bare transformer's token vectors become one; `None`: the folder says.
    pooling: str | None = None
    #: SHA-256 over the files that decide a vector, and over the pooling.
    weights_sha256: str
    weights_bytes: int
    dimensions: int
    #: Longest text the model reads, special tokens included; `None` without bound.
    max_item_tokens: int | None
    document_prompt: str
    query_prompt: str
    #: Whether vectors have length 1.
    normalised: bool
    #: The canary text's vector, little-endian float32.
    canary: bytes
    #: Measured on one slot.
    tokens_per_second: float
    #: Sizes to which its vectors may be shortened.
    matryoshka: Sequence[int] = ()
    #: `None`: local weights.
    upstream: Upstream | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFile:
    uri: str
    #: What the file was when it was planned; reading another version raises `SourceChanged`.
    etag: str
    #: Size of the file.
    bytes: int
    #: Row or line number of the first row, from 1, as messages show it.
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetExtent(_InFile):
    """Where the rows of a chunk stand in a Parquet file."""

    #: The row group in which they begin.
    row_group: int
    #: Rows of that group before them.
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExtent(_InFile):
    """Where the rows of a chunk stand in a text, in unpacked bytes."""

    offset: int
    length: int


#: Where the rows of a chunk stand in a file that workers read themselves.
Extent = ParquetExtent | TextExtent


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A worker's time-limited right to one chunk."""

    job_id: UUID
    chunk_id: int
    fence: int
    #: Unique on every timeline of Postgres, where a fence may be given twice.
    token: UUID
    worker_id: UUID
    #: Postgres backend that will commit; the sweep ends it if it freezes there.
    backend_pid: int
    first_index: int
    items: int
    #: Level of the search for an item that kills its process; 0: none under way.
    isolation: int
    #: Its name.
    model: str
    vector_space_id: int
    dimensions: int
    max_item_tokens: int | None
    lease_seconds: float
    #: The chunk's rows in a file; `None`: its items are in Postgres.
    extent: Extent | None = None
    options: KeptOptions = KeptOptions()

    @property
    def carries(self) -> bool:
        """Whether columns go through the worker into the output, instead of standing in Postgres already."""
        through = self.extent is not None or self.options.output
        return bool(through and self.options.columns.carry)
