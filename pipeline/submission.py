"""What is asked for when a corpus is submitted, and what a person may choose of the job."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from pipeline.jobs import Model
from pipeline.settings import Settings
from pipeline.sources import Source
from pipeline.store.into import Into


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person may choose of a job."""

    name: str
    dimensions: int | None = None
    dtype: str = "float32"
    max_item_tokens: int | None = None
    on_long: str = "truncate"
    max_rejects: str = ""
    unique_keys: bool = False
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    #: Workers read the files themselves; Postgres gets no texts.
    by_reference: bool = False
    #: Folder or URI of the Parquet files that vectors go to, instead of Postgres.
    output: str | None = None
    #: Where the job's end is told, instead of where its workspace says.
    webhook: str | None = None
    #: The user's own table, which gets each vector too, by key.
    into: str | None = None
    #: Whether that table gets an index at the job's end.
    hnsw: bool = False

    def decisive(self) -> dict[str, Any]:
        """Those that decide the result."""
        names = ("dimensions", "dtype", "max_item_tokens", "on_long", "max_rejects", "unique_keys", "by_reference")
        return {name: getattr(self, name) for name in (*names, "output", "into", "hnsw")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """How chunks are cut and how long a producer's lease lasts."""

    chunk_seconds: float
    chunk_items: int
    chunk_bytes: int
    lease_seconds: float


def planning(settings: Settings) -> Planning:
    """How the environment says that chunks are cut."""
    return Planning(
        chunk_seconds=settings.chunk_seconds,
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        lease_seconds=settings.lease_seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is asked for."""

    workspace_id: int
    model: Model
    corpus: Source
    options: Options
    planning: Planning
    #: The job's id, a UUIDv7, where it is known already; needs an idempotency key.
    job_id: UUID | None = None
    #: Hears how many items are committed.
    on_items: Callable[[int], None] = lambda _: None
    #: Called in the transaction that makes the job runnable, anew or again; what it raises undoes that.
    on_queue: Callable[[Connection, UUID], None] = lambda _, __: None
    #: Hears that somebody else has the job by now, while the corpus may still be read.
    on_lost: Callable[[], None] = lambda: None

    def payload(self) -> str:
        """SHA-256 over the sources and the options that decide the result; a stream counts once it is read."""
        decisive = {
            "model": self.model.name,
            "weights": self.model.weights_sha256,
            "source": self.corpus.fingerprint(),
            **self.options.decisive(),
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def stored_options(self, into: Into | None) -> dict[str, Any]:
        """What the job row keeps under `options`."""
        return {
            **self.options.decisive(),
            "into": into.to_json() if into else None,
            "columns": asdict(self.corpus.columns),
            "item_bytes": self.corpus.item_bytes,
            "webhook": self.options.webhook,
        }


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job that a submission came to."""

    job_id: UUID
    #: Why no new job was made, for a person; empty when one was.
    attached: str = ""
    #: What a person should know though nothing was refused.
    notices: Sequence[str] = ()
