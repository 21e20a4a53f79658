"""Models of a job's status and receipt, the same in the CLI, the API and the dashboard."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field

from pipeline.core.jobs import JobState


class ItemCounts(BaseModel):
    """Counts of a job's items."""

    total: int = 0
    embedded: int = 0
    reused: int = 0
    unchanged: int = Field(default=0, description="Rows of a sync whose text the collection has already.")
    rejected: int = 0
    cancelled: int = 0
    pending: int = 0
    truncated: int = 0
    removed: int = Field(default=0, description="Keys that a sync has removed; they are no items.")

    @property
    def over(self) -> int:
        """Number of items that are embedded, reused, unchanged, rejected or cancelled."""
        return self.total - self.pending


class TokenCounts(BaseModel):
    """Counts of a job's tokens."""

    prompt: int = 0


class TruncatedItem(BaseModel):
    """Item of which the model read only the beginning."""

    index: int
    key: str | None
    lost_tokens: int = Field(description="Tokens that it didn't read; of a very long text about so many.")


class Rate(BaseModel):
    """Throughput over the last minute, or over the last minute before the job's end."""

    items_per_second: float = 0.0
    tokens_per_second: float = 0.0
    roofline: float | None = Field(
        default=None,
        description="Share of the devices' rate of matrix products that embedding reached. "
        "Null: nothing was committed, or by a static model or an upstream.",
    )


class ChunkCounts(BaseModel):
    """Counts of a job's chunks by state."""

    pending: int = 0
    running: int = 0
    done: int = 0
    cancelled: int = 0

    @property
    def total(self) -> int:
        """Number of chunks in all states."""
        return self.pending + self.running + self.done + self.cancelled


class JobStatus(BaseModel):
    """State and progress of a job. Counts are items or tokens, rates are per second."""

    id: UUID
    name: str
    workspace: str | None = Field(default=None, description="Workspace of the job; set in lists only.")
    state: JobState
    reason: str | None = Field(description="Why it is paused or has failed.")
    message: str | None
    model: str
    labels: dict[str, str]
    output: str | None = Field(description="Place of its Parquet files; null: its vectors are in Postgres.")
    notices: list[str] = Field(description="Notices about the rows, none of which is an error.")
    items: ItemCounts
    passages: int | None = Field(default=None, description="Passages embedded; null: each text has one vector.")
    lost_tokens: int = Field(
        default=0, description="Tokens of truncated texts that the model didn't read; of very long texts about so many."
    )
    most_truncated: list[TruncatedItem] = Field(default=[], description="The items that lost the most tokens.")
    tokens: TokenCounts
    rate: Rate
    eta_seconds: float | None
    chunks: ChunkCounts
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class AccountedItems(BaseModel):
    """Counts of items at the job's end: in = embedded + reused + unchanged + rejected + cancelled."""

    submitted: int = Field(alias="in")
    embedded: int
    reused: int
    unchanged: int = Field(default=0, description="Rows of a sync whose text the collection had already.")
    rejected: int
    cancelled: int
    removed: int = Field(default=0, description="Keys that a sync has removed; they are no items.")
    forgotten: int = Field(default=0, description="Of all these, items whose key was forgotten since: they are erased.")

    @property
    def settled(self) -> int:
        """Number of items that are embedded, reused, unchanged, rejected or cancelled."""
        return self.embedded + self.reused + self.unchanged + self.rejected + self.cancelled


class AccountedTokens(BaseModel):
    """Tokens metered, and tokens billed by upstreams."""

    prompt: int = Field(description="Tokens counted by the encoders that embedded the items.")
    billed: int = Field(
        default=0,
        description="Tokens billed according to upstreams' replies, including replies to lost claims.",
    )
    unanswered: int = Field(
        default=0,
        description="Estimated tokens of requests for which no reply reported billed tokens.",
    )
    reused: int
    saved: int = Field(default=0, description="Tokens of reused and unchanged texts, which nothing embedded.")


class Account(BaseModel):
    """Final account of a job's items and tokens, frozen at its end."""

    items: AccountedItems
    tokens: AccountedTokens
    balanced: bool


class EmbeddedOn(BaseModel):
    """Part of a job's items that one kind of device embedded in one precision."""

    device: str = Field(description="Kind of the device: cpu, mps, or a GPU's name.")
    precision: str = Field(description="float32, bfloat16 or float16.")
    items: int
    tokens: int


class Receipt(BaseModel):
    """Receipt of a job: its account, and the result of checking it against the rows themselves."""

    id: UUID
    state: JobState
    items: AccountedItems
    tokens: AccountedTokens
    passages: int | None = Field(default=None, description="Passages embedded; null: each text has one vector.")
    truncated: int = Field(description="Embedded texts that were truncated.")
    lost_tokens: int = Field(default=0, description="Tokens of them that the model didn't read.")
    most_truncated: list[TruncatedItem] = Field(default=[], description="The items that lost the most tokens.")
    embedded_on: list[EmbeddedOn] = Field(
        default=[],
        description="Devices that embedded the items, as usage rows say. Items that an upstream embedded are left out.",
    )
    balanced: bool
    verified: bool | None = Field(default=None, description="With verify=true.")
    missing: int | None = None
    double: int | None = None
