"""Sinks: the outputs of a job's vectors. A new output takes a class like these, an option, and a flag."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from typing import Protocol
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.parquet_erasure import Erased
from pipeline.chunk_io.parquet_sink import ParquetSink
from pipeline.core.chunks import Claim, Item
from pipeline.core.collections import SyncOptions
from pipeline.core.jobs import Job
from pipeline.core.options import KeptOptions, UserTable, VectorType
from pipeline.db import collections, embeddings, items, jobs, syncs, user_table
from pipeline.db.embeddings import EmbeddedRows, Vector
from pipeline.db.outputs import Staged

#: Vectors of a job in the order of index and passage.
Block = Sequence[Vector]
#: Opens a transaction, or lends the current one.
Connect = Callable[[], AbstractContextManager[Connection]]
#: Page size of reads, in vectors.
_PAGE = 2_000


class Sink(Protocol):
    """Output of a job's vectors, from `prepare`, before anything is staged, to `finalize`, after the last chunk."""

    #: A job isn't completed before `finalize` is done.
    finalizes: bool

    def prepare(self, job_id: UUID) -> None:
        """Prepare the output for a job's vectors, which proves that they can be written.

        Raises: the error that says why they can't.
        """

    def discard(self, job_id: UUID) -> None:
        """Delete what `prepare` has made, for a job that was never queued."""

    def fault(self, item: Item) -> str | None:
        """Return the reason why this sink can't take an item, for a reject; `None`: it can."""

    def settled(self, engine: Engine, claim: Claim) -> set[int]:
        """Return the indexes of a chunk's items that have their vector, beyond those that Postgres knows.

        No transaction is open while files are read.
        """

    def stage(self, claim: Claim, number: int, rows: EmbeddedRows) -> Staged | None:
        """Write the rows of commit `number` of a claim to files, before its transaction begins.

        They don't count until `write` has recorded them. `None`: nothing is written in advance.
        """

    def write(self, connection: Connection, claim: Claim, rows: EmbeddedRows, staged: Staged | None) -> None:
        """Write rows, or record the staged file, within the transaction of the fenced update."""

    def finalize(self, engine: Engine, job: Job) -> None:
        """Finish the output after the last chunk. Idempotent, also after an interruption at any point.

        Raises:
            Waiting: the job has changed in the meantime, and must be finalised again.
        """

    def takes_long(self, connection: Connection) -> bool:
        """Return True if `finalize` may take hours."""

    def conclude(self, connection: Connection, job: Job) -> str | None:
        """Do what becomes visible with the job's completion, in the transaction that completes it. Return why the job
        fails instead, with nothing done; `None`: it completes."""

    def read(self, connect: Connect, job_id: UUID, first_index: int, end_index: int) -> Iterator[Block]:
        """Yield a job's vectors from `first_index` to before `end_index`, in index order and bounded memory.

        Each database query is within `connect()`: a short transaction, or one snapshot for all.
        """

    def erase(self, engine: Engine, job: Job, keys: Set[str], still: Callable[[], object]) -> Erased:
        """Erase keys of an ended job from its files. `still` raises if somebody else may do that now.

        Raises:
            Waiting: the job is tried again.
            StorageRefused, StorageUnreachable: a file can't be written.
        """

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """Return (missing, double) of a job, as `pipeline.jobs.verification` defines them."""


class RowsSink:
    """Sink that writes rows of the table `embeddings`, or of `passages` for a job that splits."""

    finalizes = False

    def __init__(self, *, passages: bool) -> None:
        self._passages = passages

    def prepare(self, job_id: UUID) -> None:
        """Do nothing: the partitions exist already."""

    def discard(self, job_id: UUID) -> None:
        """Do nothing: no row is written before the job is queued."""

    def fault(self, item: Item) -> str | None:  # noqa: ARG002 - any item has a place
        """Return None: every item fits."""
        return None

    def settled(self, engine: Engine, claim: Claim) -> set[int]:  # noqa: ARG002 - Postgres knows them all
        """Return an empty set: Postgres knows all of them."""
        return set()

    def stage(self, claim: Claim, number: int, rows: EmbeddedRows) -> None:
        """Do nothing: rows are written in the transaction."""

    def write(self, connection: Connection, claim: Claim, rows: EmbeddedRows, staged: Staged | None) -> None:  # noqa: ARG002
        """Insert rows, and the carried columns that came with items from files."""
        embeddings.copy_rows(connection, claim.job_id, claim.vector_space_id, rows, claim.options.dtype)
        if rows.carried:
            items.copy_carried(connection, claim.job_id, rows)

    def finalize(self, engine: Engine, job: Job) -> None:
        """Do nothing: the rows are complete."""

    def takes_long(self, connection: Connection) -> bool:  # noqa: ARG002
        """Return False: there is nothing to do."""
        return False

    def conclude(self, connection: Connection, job: Job) -> str | None:  # noqa: ARG002
        """Do nothing: the rows are visible."""
        return None

    def read(self, connect: Connect, job_id: UUID, first_index: int, end_index: int) -> Iterator[Block]:
        """Yield rows page by page."""
        after = embeddings.before(first_index)
        while True:
            with connect() as connection:
                page = embeddings.page(connection, job_id, after, end_index, _PAGE, passages=self._passages)
            if page:
                yield page
            if len(page) < _PAGE:
                return
            after = (page[-1].index, page[-1].passage)

    def erase(self, engine: Engine, job: Job, keys: Set[str], still: Callable[[], object]) -> Erased:  # noqa: ARG002
        """Do nothing: there are no files."""
        return Erased(0, is_whole=True)

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """Count by joins; for items that are in files, by the ranges of their chunks."""
        if job.options.by_reference:
            return embeddings.verify_without_items(connection, job.id, job.items_total, passages=self._passages)
        return embeddings.verify(connection, job.id, passages=self._passages)


class TableSink(RowsSink):
    """Sink that writes the same rows, and also each vector by key to a table of the user, in the same transaction."""

    def __init__(self, table: UserTable, *, hnsw: bool, passages: bool) -> None:
        """Create the sink of a user's table. `hnsw`: build an index on it at the job's end."""
        super().__init__(passages=passages)
        self._table = table
        self.finalizes = hnsw

    def fault(self, item: Item) -> str | None:
        """Return the reason why an item's key doesn't fit the table's column; `None`: it fits."""
        return self._table.key_fault(item.key)

    def write(self, connection: Connection, claim: Claim, rows: EmbeddedRows, staged: Staged | None) -> None:
        """Insert rows, and upsert their vectors into the table."""
        super().write(connection, claim, rows, staged)
        user_table.upsert(connection, self._table, claim.job_id, np.unique(rows.indexes).tolist())

    def takes_long(self, connection: Connection) -> bool:  # noqa: ARG002
        """Return True if there is an index to build."""
        return self.finalizes

    def finalize(self, engine: Engine, job: Job) -> None:  # noqa: ARG002 - the table is the same for all
        """Build the HNSW index if it was asked for."""
        if self.finalizes:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                user_table.build_hnsw(connection, self._table)


class CollectionSink(RowsSink):
    """Sink that writes the same rows, and brings a collection, and perhaps a table of the user, up to them in the same
    transaction.

    An atomic sync shows none of them before its end.
    """

    finalizes = True

    def __init__(
        self, sync: SyncOptions, kept_as: VectorType, table: UserTable | None, *, hnsw: bool, passages: bool
    ) -> None:
        """Create the sink of a sync. `hnsw`: build an index on the user's table at its end."""
        super().__init__(passages=passages)
        self._sync, self._kept_as, self._table, self._hnsw = sync, kept_as, table, hnsw

    def fault(self, item: Item) -> str | None:
        """Return the reason why an item's key doesn't fit the user's table; `None`: it fits, or there is none."""
        return self._table.own_key_fault(item.key) if self._table else None

    def write(self, connection: Connection, claim: Claim, rows: EmbeddedRows, staged: Staged | None) -> None:
        """Insert rows, and give the collection's keys their new vectors."""
        super().write(connection, claim, rows, staged)
        if not self._sync.atomic:
            self._publish(connection, claim.job_id, np.unique(rows.indexes).tolist())

    def takes_long(self, connection: Connection) -> bool:
        """Return True if there is an index to build."""
        return collections.lacks_index(connection, self._sync.version_id)

    def finalize(self, engine: Engine, job: Job) -> None:
        """Build the HNSW index of what the collection holds, if it has none."""
        with engine.begin() as connection:
            dimensions = jobs.vector_space(connection, job.id)["dimensions"]
            fits = dimensions <= user_table.HNSW_DIMENSIONS[self._kept_as.sql_type]
            if fits and collections.lacks_index(connection, self._sync.version_id):
                collections.build_index(connection, self._sync.version_id)
        if self._table and self._hnsw:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                user_table.build_hnsw(connection, self._table)

    def conclude(self, connection: Connection, job: Job) -> str | None:
        """Remove what the source lacks; of an atomic sync, show all."""
        if self._sync.atomic and collections.exists(connection, self._sync.version_id):
            self._publish(connection, job.id, None)
        return syncs.settle(
            connection,
            job.id,
            self._sync.version_id,
            keep_rejected=self._sync.keep_rejected,
            into=self._table,
        )

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """Count by joins: also where texts are in files, a sync's items are in Postgres."""
        return embeddings.verify(connection, job.id, passages=self._passages)

    def _publish(self, connection: Connection, job_id: UUID, indexes: Sequence[int] | None) -> None:
        syncs.publish(connection, self._sync.version_id, job_id, indexes, passages=self._passages)
        if self._table:
            user_table.upsert(connection, self._table, job_id, indexes)


def sink_of(options: KeptOptions) -> Sink:
    """Return the sink of a job with these options."""
    if options.sync:
        return CollectionSink(options.sync, options.dtype, options.table, hnsw=options.hnsw, passages=options.splits)
    if options.output:
        return ParquetSink(options.output, options.dtype, options.columns.carry, passages=options.splits)
    if options.table:
        return TableSink(options.table, hnsw=options.hnsw, passages=options.splits)
    return RowsSink(passages=options.splits)
