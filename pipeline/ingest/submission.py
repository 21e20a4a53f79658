"""The submission of a corpus, and what came of it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import Connection

from pipeline.core.models import Model
from pipeline.core.options import JobOptions, KeptOptions, UserTable
from pipeline.infra.settings import Settings
from pipeline.sources import Source


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
    planning: Planning
    #: The job's.
    name: str
    options: JobOptions = JobOptions()
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
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

    def kept_options(self, table: UserTable | None) -> KeptOptions:
        """What the job's row keeps; `table` is what `into` names."""
        return KeptOptions.of(self.options, self.corpus.columns, self.corpus.item_bytes, table)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job that a submission came to."""

    job_id: UUID
    #: Why no new job was made, for a person; empty when one was.
    attached: str = ""
    #: What a person should know though nothing was refused.
    notices: Sequence[str] = ()
