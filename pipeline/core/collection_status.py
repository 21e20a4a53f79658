"""Models of a collection's state and history, the same in the CLI, the API and the dashboard."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from pipeline.core.collections import VersionState
from pipeline.core.jobs import JobState


def stale_seconds(expect_every: timedelta | None, since: datetime) -> float | None:
    """Return the seconds beyond the time in which a sync is expected, after the last one or the collection's creation;
    `None`: it isn't stale."""
    if expect_every is None:
        return None
    late = (datetime.now(UTC) - since - expect_every).total_seconds()
    return late if late > 0 else None


class FilesStatus(BaseModel):
    """State of the Parquet files of a collection's version."""

    uri: str = Field(description="Their folder; `_manifest.json` in it lists those that make up the newest set.")
    version: int = Field(description="Number of the set that readers see; 0: none yet.")
    files: int
    rows: int = Field(description="Rows in them, with those that later ones replace.")
    bytes: int
    written_at: datetime | None
    behind: bool = Field(description="Changes wait to be written.")
    problem: str | None = Field(description="Why they can't be written; null: they can.")


class VersionStatus(BaseModel):
    """State of a collection's version beside the current one."""

    state: VersionState = Field(description="next: being filled; previous: readers may go back to it.")
    model: str
    dimensions: int
    keys: int = Field(description="Keys that have vectors; above 100,000 an estimate.")
    running: UUID | None = Field(description="Its sync that hasn't ended.")
    differs: str | None = Field(description="How it differs from the current version; null: it doesn't.")
    kept_until: datetime | None = Field(description="Of a previous version: the end of the time in which it is kept.")
    output: FilesStatus | None = Field(default=None, description="Its Parquet files; null: it has none.")


class CollectionStatus(BaseModel):
    """State of a collection."""

    name: str
    view: str = Field(description="The view that readers use, in the schema vectormill.")
    model: str
    dimensions: int
    keys: int = Field(description="Keys that have vectors; above 100,000 an estimate.")
    options: dict[str, Any] = Field(description="The options with which its texts are embedded.")
    expect_every_seconds: float | None = Field(description="Longest time between two syncs that is no cause for alarm.")
    synced_at: datetime | None = Field(description="End of its last completed sync.")
    running: UUID | None = Field(description="Its sync that hasn't ended.")
    created_at: datetime
    output: FilesStatus | None = Field(default=None, description="Its Parquet files; null: it has none.")
    versions: list[VersionStatus] = Field(default=[], description="Versions of other models, which syncs fill too.")

    @property
    def stale_seconds(self) -> float | None:
        """Seconds beyond the expected time since the last sync; `None`: it isn't stale."""
        every = None if self.expect_every_seconds is None else timedelta(seconds=self.expect_every_seconds)
        return stale_seconds(every, self.synced_at or self.created_at)


class SyncStatus(BaseModel):
    """A sync of a collection's history. Counts are final once it has completed."""

    job_id: UUID
    state: JobState | None = Field(description="State of its job; null: the job is purged.")
    model: str | None = Field(description="Model of the version that it filled; null: both are gone.")
    beside: bool = Field(description="It filled another version than the current one of its time.")
    delta: bool
    added: int = Field(description="Keys that are new.")
    changed: int = Field(description="Keys that have new vectors.")
    unchanged: int
    removed: int
    rejected: int
    tokens_saved: int = Field(description="Tokens of reused and unchanged texts, which nothing embedded.")
    seconds: float = Field(description="Time from its submission to its end, or until now.")
    created_at: datetime
    finished_at: datetime | None


class Comparison(BaseModel):
    """Comparison of a collection's next version with the current one."""

    model: str = Field(description="Model of the current version.")
    next_model: str
    keys: int
    next_keys: int
    tokens: int = Field(description="Tokens of all texts, as the next model counts them.")
    cost: float | None = Field(description="What embedding them costs by the next model's price; null: it has none.")
    sampled: int = Field(description="Keys that were drawn at random.")
    overlap_at_10: float | None = Field(
        description="Share of a key's ten nearest keys that both versions agree on, on average; null: too few keys."
    )


class CollectionList(BaseModel):
    """Collections by name."""

    data: list[CollectionStatus]


class SyncList(BaseModel):
    """Newest syncs of a collection, newest first."""

    data: list[SyncStatus]
