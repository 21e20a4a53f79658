"""Rehearsal of a job's reads and writes, by which a dry run measures them: in scratch tables, and for Parquet in a
temporary folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from uuid import uuid4

from sqlalchemy import Engine

from pipeline.chunk_io.commit import split_bad_vectors
from pipeline.chunk_io.sinks import sink_of
from pipeline.core.chunks import Claim, Item
from pipeline.core.options import KeptOptions
from pipeline.db import embeddings, items, scratch
from pipeline.db.embeddings import EmbeddedRows
from pipeline.db.scratch import Scratch


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Job of which nothing stays."""

    claim: Claim
    tables: Scratch

    def stage(self, first_index: int, blocks: Sequence[items.Block]) -> None:
        """Copy items as a submission does."""
        items.copy_items(self.tables.connection, self.claim.job_id, first_index, blocks, table=self.tables.items)

    def read(self, first_index: int, count: int) -> Sequence[Item]:
        """Read items as a worker does."""
        return scratch.read(self.tables, first_index, count, carried=self.claim.carries)

    def write(self, rows: EmbeddedRows) -> int:
        """Write vectors as a worker's commit does. Return the bytes of the Parquet part; 0 if it goes to Postgres."""
        claim = self.claim
        split_bad_vectors(rows, claim.dimensions, claim.options.dtype)
        if claim.options.output:
            sink = sink_of(claim.options)
            staged = sink.stage(replace(claim, token=uuid4()), 0, rows)
            return staged.output.bytes if staged else 0
        embeddings.copy_rows(
            self.tables.connection,
            claim.job_id,
            claim.vector_space_id,
            rows,
            claim.options.dtype,
            table=self.tables.vectors,
        )
        return 0


@contextmanager
def rehearsing(
    engine: Engine, options: KeptOptions, *, model: str, dimensions: int, max_item_tokens: int | None
) -> Iterator[Rehearsal]:
    """Open a rehearsal; `options.output` says only that vectors go to Parquet. All of it is gone at the end."""
    with (
        TemporaryDirectory(prefix="vectormill-dry-run-") as folder,
        scratch.scratch_tables(engine, passages=options.splits) as tables,
    ):
        claim = Claim(
            job_id=scratch.JOB_ID,
            chunk_id=0,
            fence=1,
            token=uuid4(),
            worker_id=uuid4(),
            backend_pid=0,
            first_index=0,
            items=0,
            isolation=0,
            model=model,
            vector_space_id=1,
            dimensions=dimensions,
            max_item_tokens=max_item_tokens,
            lease_seconds=0,
            options=replace(options, output=options.output and folder),
        )
        yield Rehearsal(claim, tables)
