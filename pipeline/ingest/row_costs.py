"""Measurement of a job's rows: the time to write some that look like its own, and the bytes that they take."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from time import perf_counter
from typing import NamedTuple

import numpy as np
from sqlalchemy import Engine

from pipeline.chunk_io.rehearsal import Rehearsal, rehearsing
from pipeline.core.options import KeptOptions
from pipeline.db import items, scratch
from pipeline.db.embeddings import EmbeddedRows, Passages
from pipeline.ingest.prediction import NO_ROW, RowCost
from pipeline.sources.validation import BLOCK_ROWS

#: Time for which each kind of row is written, in at least three copies.
_SECONDS = 1.0
_LEAST_COPIES = 3
#: Rows of one copy, about as many as a submission and a chunk have, and bytes.
_ITEMS, _VECTORS = 50_000, 10_000
_BYTES = 16 * 1024 * 1024
#: A tuple's header and item pointer, and a WAL record's header.
_TUPLE_BYTES = 28


class SampleRow(NamedTuple):
    """Row of the corpus that has a text."""

    key: str | None
    text: bytes
    carried: bytes | None
    title: bytes = b""


def measure_rows(
    engine: Engine, sample: Sequence[SampleRow], options: KeptOptions, dimensions: int
) -> tuple[RowCost, RowCost]:
    """Return the cost of staging an item and of writing a vector, measured in scratch tables that nobody else sees."""
    if not sample:
        return NO_ROW, NO_ROW
    row = sum(len(each.text) + len(each.key or "") + len(each.carried or b"") for each in sample) / len(sample)
    with rehearsing(engine, options, model="", dimensions=dimensions, max_item_tokens=None) as rehearsal:
        staged = NO_ROW
        if not options.by_reference:
            staged = _staged(rehearsal, list(islice(cycle(sample), _count(_ITEMS, row))), row)
        vector = dimensions * options.dtype.element_bytes
        return staged, _written(rehearsal, list(islice(cycle(sample), _count(_VECTORS, vector))), vector)


def _count(most: int, row_bytes: float) -> int:
    return max(1, min(most, int(_BYTES / (row_bytes + 1))))


def _staged(rehearsal: Rehearsal, rows: Sequence[SampleRow], row_bytes: float) -> RowCost:
    carries = rehearsal.claim.options.columns.carry

    def block(part: Sequence[SampleRow]) -> items.Block:
        carried = [each.carried or b"{}" for each in part] if carries else None
        titles = [each.title for each in part] if rehearsal.claim.options.columns.title else None
        return items.Block([each.key for each in part], [each.text for each in part], carried, titles)

    # Postgres takes one block while the next is laid out.
    blocks = [block(rows[start : start + BLOCK_ROWS]) for start in range(0, len(rows), BLOCK_ROWS)]

    def stage(copy: int) -> int:
        rehearsal.stage(copy * len(rows), blocks)
        return 0

    return _cost(rehearsal, stage, len(rows), row_bytes)


def _written(rehearsal: Rehearsal, rows: Sequence[SampleRow], vector_bytes: int) -> RowCost:
    dimensions = rehearsal.claim.dimensions
    vectors = np.random.default_rng(0).standard_normal((len(rows), dimensions), dtype=np.float32) / dimensions**0.5

    numbers = np.zeros(len(rows), dtype=np.int32)

    def write(copy: int) -> int:
        return rehearsal.write(
            EmbeddedRows(
                indexes=np.arange(len(rows)) + copy * len(rows),
                keys=[each.key for each in rows],
                vectors=vectors,
                tokens=np.full(len(rows), 100, dtype=np.int32),
                truncated=np.zeros(len(rows), dtype=np.bool_),
                carried=[each.carried or b"" for each in rows] if rehearsal.claim.carries else (),
                passages=Passages(numbers, numbers, numbers) if rehearsal.claim.options.splits else None,
            )
        )

    return _cost(rehearsal, write, len(rows), vector_bytes)


def _cost(rehearsal: Rehearsal, write: Callable[[int], int], rows: int, row_bytes: float) -> RowCost:
    """Write copies of some rows for a while, and return the cost of a row. `write` returns bytes of Parquet."""
    tables = rehearsal.tables
    before, logged, parquet = _disk_bytes(rehearsal), [], 0
    began, copies = perf_counter(), 0
    while copies < _LEAST_COPIES or perf_counter() - began < _SECONDS:
        from_wal = scratch.wal_bytes(tables.connection)
        parquet += write(copies)
        logged.append(scratch.wal_bytes(tables.connection) - from_wal)
        copies += 1
    seconds = perf_counter() - began
    disk = (_disk_bytes(rehearsal) - before) / (copies * rows)
    # Other sessions write to the WAL too, so the least counts. Where these rows aren't logged, it is their size.
    wal = min(logged) / rows if tables.logged else row_bytes + _TUPLE_BYTES
    return RowCost(
        seconds=seconds / (copies * rows),
        wal_bytes=wal if disk else 0.0,
        disk_bytes=disk,
        parquet_bytes=parquet / (copies * rows),
    )


def _disk_bytes(rehearsal: Rehearsal) -> int:
    tables = rehearsal.tables
    return sum(scratch.disk_bytes(tables, each) for each in (tables.items, tables.vectors))
