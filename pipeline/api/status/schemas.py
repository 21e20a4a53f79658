"""Schemas of `/api/jobs`: pages of jobs, chunks and rejects."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field

from pipeline.core.chunks import ChunkState, RejectCode
from pipeline.core.job_status import JobStatus


class JobPage(BaseModel):
    """Page of jobs, newest first."""

    data: list[JobStatus]
    has_more: bool
    after: UUID | None = Field(description="Send it as `after` for the next page.")


class Chunk(BaseModel):
    """Contiguous range of a job's items."""

    id: int
    ordinal: int
    first_index: int
    items: int
    state: ChunkState
    fence: int = Field(description="Number of times that it was claimed or reopened.")
    crashes: int
    last_error: str | None
    embedded: int
    reused: int
    rejected: int
    cancelled: int
    truncated: int
    prompt_tokens: int
    passages: int = Field(description="Vectors, where texts are split; else 0.")
    lost_tokens: int = Field(description="Tokens of truncated texts that the model didn't read.")
    output_uri: str | None
    lease_until: datetime | None
    not_before: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class ChunkPage(BaseModel):
    """Page of chunks, in the order of their items."""

    data: list[Chunk]
    has_more: bool
    after: int | None = Field(description="Send it as `after` for the next page.")


class Rejected(BaseModel):
    """Item that can't be embedded."""

    index: int
    key: str | None
    code: RejectCode
    message: str


class RejectPage(BaseModel):
    """Page of rejects, in the order of their items."""

    data: list[Rejected]
    counts: dict[str, int] | None = Field(
        description="All of the job's rejects by code, on the first page only; null on later pages."
    )
    has_more: bool
    after: int | None = Field(description="Send it as `after` for the next page.")


class Retried(BaseModel):
    """Result of a retry."""

    reopened_chunks: int
    job: JobStatus


class Priority(BaseModel):
    """Priority of a job among others."""

    priority: int = Field(ge=-100, le=100, description="Higher goes first; 0 is usual.")
