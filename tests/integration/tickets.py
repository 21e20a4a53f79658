"""A collection of tickets, as its user and the servers treat it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
from sqlalchemy import Engine

from pipeline.catalog.models import find_model, workspace_id
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.db import chunks, jobs
from pipeline.dispatch import finalize
from pipeline.infra.settings import Settings
from pipeline.ingest.collections import create_collection, upgrade_collection
from pipeline.ingest.submission import planning
from pipeline.ingest.sync import SyncRequest, columns_of, submission_of, sync_collection
from pipeline.jobs.collections import find_collection
from pipeline.jobs.verification import verified_receipt
from pipeline.sources import Corpus
from tests.support.jobs_made import chunk_rows, run_sql, taken
from workers.encoders.local import LocalEncoder
from workers.runner.run_chunk import run_chunk
from workers.watchdog import Watch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Row = Mapping[str, Any]
#: Dimensions of the model `small`.
SMALL = 64


class Tickets:
    """A collection, and what its user does with it."""

    def __init__(
        self, engine: Engine, encoder: LocalEncoder, library: "SentenceTransformer", folder: Path, **options: Any
    ) -> None:
        self.engine, self._library, self.folder = engine, library, folder
        #: Workers read the texts from the files of its syncs.
        self.by_reference = False
        #: What embeds for each model.
        self.encoders = {"static": encoder}
        with engine.begin() as connection:
            self.workspace = workspace_id(connection)
            wish = JobOptions.model_validate(options)
            create_collection(connection, self.workspace, "tickets", model="static", options=wish)

    def submit(self, rows: Sequence[Row], *, queue: bool = False, key: str | None = None, **wish: Any) -> UUID:
        """Submit a sync of these rows."""
        paths = []
        parts = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if self.by_reference else (rows,)
        for number, part in enumerate(parts):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            paths.append(self.folder / f"{sha256(lines.encode()).hexdigest()}-{number}.jsonl")
            if not paths[-1].exists():  # its time would be another source
                paths[-1].write_text(lines)
        return self.submit_files(paths, queue=queue, key=key, **wish)

    def submit_files(self, paths: Sequence[Path], *, queue: bool = False, key: str | None = None, **wish: Any) -> UUID:
        """Submit a sync of these files."""
        with self.engine.begin() as connection:
            collection = find_collection(connection, self.workspace, "tickets")
            model = find_model(connection, self.workspace, collection.model)
        asked = SyncRequest.model_validate({"by_reference": self.by_reference, **wish})
        corpus = Corpus(list(map(str, paths)), columns_of(collection, asked), 1_000_000)
        plan = replace(planning(Settings()), chunk_items=7)
        submission = submission_of(collection, model, asked, corpus, plan, key)
        return sync_collection(self.engine, submission, asked, queue=queue).job_id

    def run(self, job: UUID) -> None:
        """Embed a sync's chunks, and end it."""
        self.embed(job)
        self.end(job)

    def embed(self, job: UUID) -> None:
        """Embed a sync's chunks."""
        for ordinal, row in enumerate(chunk_rows(self.engine, job)):
            if row["state"] == "pending":
                self.run_chunk(job, ordinal)

    def run_chunk(self, job: UUID, ordinal: int) -> None:
        claim = taken(self.engine, job, ordinal)
        with self.engine.begin() as connection:
            found = jobs.by_id(connection, job)
        assert found is not None
        run_chunk(
            self.engine, self.encoders[found.model], claim, Watch(hung_after_seconds=60, most_seconds=60), lambda: None
        )

    def end(self, job: UUID) -> None:
        finalize.finalize(self.engine, job)

    def sync(self, rows: Sequence[Row], **how: Any) -> dict[str, int]:
        """Sync these rows to the end; return the counts of the verified receipt that aren't zero."""
        job = self.submit(rows, **how)
        self.run(job)
        with self.engine.begin() as connection:
            found = jobs.by_id(connection, job)
            receipt = verified_receipt(connection, job)
        assert found is not None
        assert found.state is JobState.COMPLETED, found.message
        assert receipt.verified
        return {name: count for name, count in receipt.items.model_dump(by_alias=True).items() if count}

    def view(self, *columns: str) -> dict[str, Any]:
        """Return what readers see: vectors by key, or these columns by key."""
        wanted = ", ".join(columns or ("vector::text",))
        rows = run_sql(self.engine, f"select key, {wanted} from vectormill.tickets")
        return {row[0]: row[1] if len(row) == 2 else tuple(row[1:]) for row in rows}

    def fresh(self, rows: Sequence[Row], text: str = "text") -> dict[str, list[float]]:
        """Embed rows anew, by the library itself."""
        vectors = self._library.encode([row[text] for row in rows]) if rows else []
        return {str(row["id"]): vector.tolist() for row, vector in zip(rows, vectors, strict=True)}

    def shows(self, rows: Sequence[Row]) -> None:
        """Assert that the view equals a fresh embedding of these rows."""
        seen, wanted = self.view(), self.fresh(rows)
        assert seen.keys() == wanted.keys()
        for key, vector in wanted.items():
            np.testing.assert_allclose(json.loads(seen[key]), vector, atol=1e-5)


def rows_of(count: int, about: str = "a mill") -> list[dict[str, Any]]:
    return [{"id": f"k{n}", "text": f"{about} of kind {n}", "lang": "en" if n % 2 else "de"} for n in range(count)]


def upgrade(tickets: Tickets, model: str = "small") -> None:
    """Begin a next version of another model."""
    with tickets.engine.begin() as connection:
        upgrade_collection(connection, tickets.workspace, "tickets", model=model)


def beside(tickets: Tickets, leader: UUID) -> UUID:
    """Return the sync of the other version."""
    (job,) = run_sql(tickets.engine, "select job_id from vectormill.syncs where beside = :job", job=leader)[0]
    return UUID(str(job))


def sync_both(tickets: Tickets, rows: Sequence[Row], **how: Any) -> None:
    """Sync all versions of a collection to the end."""
    leader = tickets.submit(rows, **how)
    tickets.run(leader)
    tickets.run(beside(tickets, leader))


def drain_job(engine: Engine, job: UUID) -> None:
    """Cancel a failing job's pending chunks, as the dispatcher does."""
    with engine.begin() as connection:
        chunks.cancel_pending(connection, job, 0, 1_000)
