"""How `/api/jobs` shows jobs, chunks, rejects and receipts."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field

from pipeline.jobs import ChunkState, JobState, RejectCode


class Items(BaseModel):
    """Counts of items."""

    total: int
    embedded: int
    reused: int
    rejected: int
    cancelled: int
    pending: int
    truncated: int


class Tokens(BaseModel):
    """Counts of tokens."""

    prompt: int


class Rate(BaseModel):
    """Of the last minute, or of the last one before the job's end."""

    items_per_second: float
    tokens_per_second: float


class Chunks(BaseModel):
    """Counts of chunks by state."""

    pending: int
    running: int
    done: int
    cancelled: int


class Job(BaseModel):
    """Where a job stands."""

    id: UUID
    name: str
    workspace: str | None = Field(default=None, description="In lists.")
    state: JobState
    reason: str | None = Field(description="Why it is paused or has failed.")
    message: str | None
    model: str
    labels: dict[str, str]
    output: str | None = Field(description="Where its vectors are as Parquet; null: in Postgres.")
    notices: list[str] = Field(description="What its sender should know of its rows, though nothing was refused.")
    items: Items
    tokens: Tokens
    rate: Rate
    eta_seconds: float | None
    chunks: Chunks
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobPage(BaseModel):
    """Jobs, newest first."""

    data: list[Job]
    has_more: bool
    after: UUID | None = Field(description="Send it as `after` for the next page.")


class Chunk(BaseModel):
    """A contiguous range of a job's items."""

    id: int
    ordinal: int
    first_index: int
    items: int
    state: ChunkState
    fence: int = Field(description="How often it was claimed, and reopened.")
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


class ChunkPage(BaseModel):
    """Chunks in the order of their items."""

    data: list[Chunk]
    has_more: bool
    after: int | None = Field(description="Send it as `after` for the next page.")


class Rejected(BaseModel):
    """An item that can't be embedded."""

    index: int
    key: str | None
    code: RejectCode
    message: str


class RejectPage(BaseModel):
    """Rejects in the order of their items."""

    data: list[Rejected]
    counts: dict[str, int] | None = Field(
        description="All of the job's rejects by code, with the first page; null: this is another."
    )
    has_more: bool
    after: int | None = Field(description="Send it as `after` for the next page.")


class ReceiptItems(BaseModel):
    """in = embedded + reused + rejected + cancelled, at the job's end."""

    into: int = Field(alias="in")
    embedded: int
    reused: int
    rejected: int
    cancelled: int


class ReceiptTokens(BaseModel):
    """Tokens metered, and what gateways billed."""

    prompt: int
    billed: int
    unanswered: int = 0
    reused: int


class Receipt(BaseModel):
    """A job's account, frozen at its end."""

    id: UUID
    state: JobState
    items: ReceiptItems
    tokens: ReceiptTokens
    truncated: int = Field(description="Embedded texts of which only the beginning was read.")
    balanced: bool
    verified: bool | None = Field(default=None, description="With verify=true.")
    missing: int | None = None
    double: int | None = None


class Retried(BaseModel):
    """What a retry came to."""

    reopened_chunks: int
    job: Job


class Priority(BaseModel):
    """A job's place among others."""

    priority: int = Field(ge=-100, le=100, description="Higher goes first; 0 is usual.")
