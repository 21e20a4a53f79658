"""Chunks and claims: chunk states, items, reject codes, and the extents of rows in files."""

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pipeline.core.options import KeptOptions


class ChunkState(enum.StrEnum):
    """State of a chunk."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


#: Legal transitions of a chunk. `retry` reopens an ended one.
CHUNK_TRANSITIONS: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.PENDING: frozenset({ChunkState.RUNNING, ChunkState.CANCELLED}),
    ChunkState.RUNNING: frozenset({ChunkState.PENDING, ChunkState.DONE, ChunkState.CANCELLED}),
    ChunkState.DONE: frozenset({ChunkState.PENDING}),
    ChunkState.CANCELLED: frozenset({ChunkState.PENDING}),
}


class RejectCode(enum.StrEnum):
    """Reason why an item can't be embedded."""

    MISSING_TEXT = "missing_text"
    NOT_A_STRING = "not_a_string"
    EMPTY_TEXT = "empty_text"
    INVALID_UTF8 = "invalid_utf8"
    NUL_CHARACTER = "nul_character"
    TOO_LARGE = "too_large"
    BAD_KEY = "bad_key"
    DUPLICATE_KEY = "duplicate_key"
    BAD_ROW = "bad_row"
    FORGOTTEN = "forgotten"
    BAD_REQUEST = "bad_request"
    TOO_LONG = "too_long"
    BAD_VECTOR = "bad_vector"
    ENCODE_FAILED = "encode_failed"
    CRASHED_WORKER = "crashed_worker"
    GATEWAY_REFUSED = "gateway_refused"
    GATEWAY_FAILED = "gateway_failed"

    @property
    def retryable(self) -> bool:
        """True if `retry` may embed the item after all: its text is kept and the cause may have gone."""
        return self in RETRYABLE_REJECTS


#: Message of a reject whose key was forgotten.
FORGOTTEN = "its key was forgotten"

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
class Chunk:
    """Row of a chunk, a contiguous range of a job's items."""

    id: int
    ordinal: int
    first_index: int
    items: int
    state: ChunkState
    #: Number of times that the chunk was claimed or reopened.
    fence: int
    crashes: int
    last_error: str | None
    embedded: int
    reused: int
    rejected: int
    cancelled: int
    truncated: int
    prompt_tokens: int
    passages: int
    lost_tokens: int
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
    #: JSON object of the columns that go into the output; empty if there are none, or if they are in Postgres already.
    carried: bytes = b""
    #: Title that the model reads before each passage.
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Item that can't be embedded, with the reason."""

    index: int
    key: str | None
    code: RejectCode
    #: Explanation for a person; never the item's text.
    message: str


#: Truncated items that are kept of a chunk, and shown of a job.
MOST_TRUNCATED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFile:
    uri: str
    #: ETag of the file when it was planned; reading another version raises `SourceChanged`.
    etag: str
    #: Size of the file.
    bytes: int
    #: Row or line number of the first row, from 1, as messages show it.
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetExtent(_InFile):
    """Extent of a chunk's rows in a Parquet file."""

    #: Row group of the first row.
    row_group: int
    #: Rows of that group before the first row.
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExtent(_InFile):
    """Extent of a chunk's rows in a text file, in uncompressed bytes."""

    offset: int
    length: int


#: Extent of a chunk's rows in a file that workers read themselves.
Extent = ParquetExtent | TextExtent


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Claim of a worker on one chunk, limited in time by its lease."""

    job_id: UUID
    chunk_id: int
    fence: int
    #: Unique across all timelines of Postgres, while a fence may be given twice.
    token: UUID
    worker_id: UUID
    #: Postgres backend that will commit; the sweep terminates it if it freezes there.
    backend_pid: int
    first_index: int
    items: int
    #: Level of the search for an item that kills its process; 0: no search is under way.
    isolation: int
    #: Name of the model.
    model: str
    vector_space_id: int
    dimensions: int
    max_item_tokens: int | None
    lease_seconds: float
    #: Extent of the chunk's rows in a file; `None`: the items are in Postgres.
    extent: Extent | None = None
    options: KeptOptions = KeptOptions()

    @property
    def carries(self) -> bool:
        """True if columns pass through the worker into the output, instead of being in Postgres already."""
        through = (self.extent is not None and not self.options.sync) or self.options.output
        return bool(through and self.options.columns.carry)
