"""Model of a request to forget keys, the same in the CLI and the API."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field


class ForgetStatus(BaseModel):
    """State of a request to forget keys."""

    id: UUID
    keys: int = Field(description="Keys that were asked for.")
    items: int = Field(description="Items of jobs that were erased so far, with vectors and rejects.")
    collected: int = Field(description="Keys that were erased so far from versions of collections.")
    requested_by: str
    waits_for: UUID | None = Field(description="Job that hasn't ended, so that it may still write such a key.")
    problem: str | None = Field(description="Why a table of yours, or a storage, can't be changed; the rest goes on.")
    created_at: datetime
    finished_at: datetime | None = Field(description="null: it goes on.")
    outputs: list[str] = Field(
        description="Places to which jobs wrote Parquet that can't be found there any more, so that it isn't changed."
    )
    more_outputs: int = Field(description="Places beyond those that are listed.")
    tables: list[str] = Field(
        description="Tables of yours to which jobs wrote, told at the end, for a whole workspace."
    )
