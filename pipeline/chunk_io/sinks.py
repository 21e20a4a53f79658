"""Sinks: where a job's vectors go. A new output is a class like these, an option, and a flag."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Connection, Engine

from pipeline.chunk_io.parquet_sink import ParquetSink
from pipeline.core.chunks import Claim, Item
from pipeline.core.jobs import Job
from pipeline.core.options import KeptOptions, UserTable
from pipeline.db import embeddings, items, user_table
from pipeline.db.embeddings import Rows
from pipeline.db.outputs import Staged

#: Rows of a job in index order: (index, key, vector as float32, tokens, truncated, carried).
Block = Sequence[tuple[Any, ...]]
#: Opens a transaction, or lends the one that there is.
Connect = Callable[[], AbstractContextManager[Connection]]
#: Vectors that are read at once.
_PAGE = 2_000


class Sink(Protocol):
    """Where a job's vectors go, and how they get there: from `prepare`, before anything is staged, to `finalize`, when
    the last chunk has ended."""

    #: Whether a job isn't completed before `finalize` has done its part, and whether that may take hours.
    finalizes: bool
    finalizes_long: bool

    def prepare(self, job_id: UUID) -> None:
        """Make room for a job's vectors; this proves that they can be written.

        Raises: what says that they can't.
        """

    def discard(self, job_id: UUID) -> None:
        """Leave nothing of a job that came to nothing."""

    def fault(self, item: Item) -> str | None:
        """Why an item has no place here, for a reject; `None`: it has one."""

    def settled(self, engine: Engine, claim: Claim) -> set[int]:
        """The indexes of a chunk's items that have their vector, beyond those that Postgres knows. No transaction is
        open while files are read."""

    def stage(self, claim: Claim, number: int, rows: Rows) -> Staged | None:
        """Write what commit `number` of a claim brings, before its transaction begins. It counts for nothing until
        `write` has recorded it. `None`: nothing is written beforehand."""

    def write(self, connection: Connection, claim: Claim, rows: Rows, staged: Staged | None) -> None:
        """Write rows, or record what was staged, within the transaction of the fenced update."""

    def finalize(self, engine: Engine, job: Job) -> None:
        """Do what is left when the last chunk has ended. May be repeated, also after it was cut off anywhere.

        Raises:
            Waiting: the job has changed meanwhile; it is to be finalized anew.
        """

    def read(self, connect: Connect, job_id: UUID, first_index: int, end_index: int) -> Iterator[Block]:
        """A job's vectors from one index to before another, in order, in bounded memory. Each look at the database is
        within `connect()`: a short transaction, or one snapshot for all."""

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """(missing, double) of a job, as `pipeline.jobs.verification` defines them."""


class RowsSink:
    """Rows of `embeddings`, with their items."""

    finalizes = finalizes_long = False

    def prepare(self, job_id: UUID) -> None:
        """Nothing: partitions are there."""

    def discard(self, job_id: UUID) -> None:
        """Nothing: no row is written before the job is queued."""

    def fault(self, item: Item) -> str | None:  # noqa: ARG002 - any item has a place
        """None."""
        return None

    def settled(self, engine: Engine, claim: Claim) -> set[int]:  # noqa: ARG002 - Postgres knows them all
        """None beyond those that Postgres knows."""
        return set()

    def stage(self, claim: Claim, number: int, rows: Rows) -> None:
        """Nothing."""

    def write(self, connection: Connection, claim: Claim, rows: Rows, staged: Staged | None) -> None:  # noqa: ARG002
        """Append rows."""
        embeddings.copy_rows(connection, claim.job_id, claim.vector_space_id, rows, claim.options.dtype)
        if claim.extent and rows.carried:
            items.copy_carried(connection, claim.job_id, rows)

    def finalize(self, engine: Engine, job: Job) -> None:
        """Nothing."""

    def read(self, connect: Connect, job_id: UUID, first_index: int, end_index: int) -> Iterator[Block]:
        """Page by page."""
        while True:
            with connect() as connection:
                page = embeddings.page(connection, job_id, first_index, end_index, _PAGE)
            if page:
                yield page
            if len(page) < _PAGE:
                return
            first_index = page[-1][0] + 1

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """By joins; items that are in files are told by their chunks' ranges."""
        if job.options.by_reference:
            return embeddings.verify_without_items(connection, job.id, job.items_total)
        return embeddings.verify(connection, job.id)


class TableSink(RowsSink):
    """Rows as above, and each vector by key in a table of the user's own, in the same transaction."""

    def __init__(self, table: UserTable, *, hnsw: bool) -> None:
        """`hnsw`: the table gets an index at the job's end."""
        self._table = table
        self.finalizes = self.finalizes_long = hnsw

    def fault(self, item: Item) -> str | None:
        """Why the key doesn't fit the table's column."""
        return self._table.key_fault(item.key)

    def write(self, connection: Connection, claim: Claim, rows: Rows, staged: Staged | None) -> None:
        """Append rows, and bring them to the table."""
        super().write(connection, claim, rows, staged)
        user_table.upsert(connection, self._table, claim.job_id, rows.indexes.tolist())

    def finalize(self, engine: Engine, job: Job) -> None:  # noqa: ARG002 - the table is the same for all
        """Build the index."""
        if self.finalizes:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                user_table.build_hnsw(connection, self._table)


def sink_of(options: KeptOptions) -> Sink:
    """Where a job with these options writes."""
    if options.output:
        return ParquetSink(options.output, options.dtype, options.columns.carry)
    if options.table:
        return TableSink(options.table, hnsw=options.hnsw)
    return RowsSink()
