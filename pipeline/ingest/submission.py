"""Submission of a corpus, and its result."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from pipeline.core.collections import SyncOptions
from pipeline.core.models import Model
from pipeline.core.options import JobOptions, KeptOptions, UserTable
from pipeline.db.collections import Collection
from pipeline.infra.settings import Settings
from pipeline.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """Size of chunks, and duration of a producer's lease."""

    chunk_seconds: float
    chunk_items: int
    chunk_bytes: int
    lease_seconds: float


def planning(settings: Settings) -> Planning:
    """Return the planning parameters that the settings hold."""
    return Planning(
        chunk_seconds=settings.chunk_seconds,
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        lease_seconds=settings.lease_seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Parameters of a submission."""

    workspace_id: int
    model: Model
    corpus: Source
    planning: Planning
    #: Name of the job.
    name: str
    options: JobOptions = JobOptions()
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    #: Who submits it, for people: a login at its machine, a role of Postgres, or `key ID`.
    submitted_by: str | None = None
    #: Query of a command, for people who see the job. Not one asked for in SQL, which stays with its request.
    query: str | None = None
    #: The collection that the job brings up to the corpus, and how.
    collection: Collection | None = None
    sync: SyncOptions | None = None
    #: Of a sync that isn't of the current version: the job that syncs that one with the same source.
    beside: UUID | None = None
    #: Id of the job, a UUIDv7, if it is known already; needs an idempotency key.
    job_id: UUID | None = None
    #: Called with the number of items committed so far.
    on_items: Callable[[int], None] = lambda _: None
    #: Called in the transaction that makes the job runnable, also after a failure; an exception rolls that back.
    on_queue: Callable[[Connection, UUID], None] = lambda _, __: None
    #: Called when the job was taken over or cancelled; the corpus may still be being read then.
    on_lost: Callable[[], None] = lambda: None

    def payload(self) -> str:
        """Return the SHA-256 over sources and the options that decide the result; a stream counts once it is read."""
        decisive: dict[str, Any] = {"source": self.corpus.fingerprint()}
        if self.sync and self.collection:
            # Which version and model are current, a swap may change between two tries.
            sync = {name: value for name, value in self.sync.to_json().items() if name != "version_id"}
            decisive |= {"collection": self.collection.id, "sync": sync, "max_rejects": self.options.max_rejects}
            if self.options.by_reference:
                decisive["by_reference"] = True
        else:
            decisive |= {"model": self.model.name, "weights": self.model.weights_sha256, **self.options.decisive()}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def kept_options(self, table: UserTable | None) -> KeptOptions:
        """Return the options for the job's row; `table` is the one that `into` names."""
        return KeptOptions.of(self.options, self.corpus.columns, self.corpus.item_bytes, table, self.sync)


@dataclass(frozen=True, slots=True)
class Submitted:
    """Result of a submission: a new job, or the one it attached to."""

    job_id: UUID
    #: Explanation for a person if no new job was made; empty otherwise.
    attached: str = ""
    #: Notices for a person, though nothing was refused.
    notices: Sequence[str] = ()
