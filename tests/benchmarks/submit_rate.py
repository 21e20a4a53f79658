"""Submission, from a file of JSON lines to a queued job, against a raw COPY of the same rows."""

import gc
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from uuid import UUID

import psycopg
from sqlalchemy import text
from uuid_utils.compat import uuid7

from pipeline.cli.context import CommandContext
from tests.benchmarks.corpus import short_rows, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, forget_jobs, servers, submit_file

_ROWS = 500_000
_COPY = "copy vectormill.items (job_id, index, key, text) from stdin"

Row = tuple[UUID, int, str, str]


def measure(rounds: Rounds) -> Values:
    """Return rows per second of each, into empty tables."""
    pairs = short_rows(_ROWS)
    job_id = uuid7()
    rows = [(job_id, index, key, body) for index, (key, body) in enumerate(pairs)]
    buffer = "".join(f"{job_id}\t{index}\t{key}\t{body}\n" for _, index, key, body in rows).encode()
    gc.freeze()  # so many objects would slow every collection, and so all allocations
    with (
        TemporaryDirectory() as folder,
        servers() as running,
        connected(running) as place,
        psycopg.connect(running.database_url) as plain,
    ):
        corpus = write_rows(Path(folder, "rows.jsonl"), pairs)
        submit_file(place, corpus)  # makes the partition and warms the caches
        try:
            return rounds.interleave(
                {
                    "submit": lambda _: _ROWS / _submit_seconds(place, corpus),
                    "COPY row by row": lambda _: _ROWS / _copy_rows_seconds(place, plain, rows),
                    "COPY of a prepared buffer": lambda _: _ROWS / _copy_buffer_seconds(place, plain, buffer),
                }
            )
        finally:
            gc.unfreeze()


def _submit_seconds(place: CommandContext, corpus: Path) -> float:
    forget_jobs(place)
    start = perf_counter()
    submit_file(place, corpus)
    seconds = perf_counter() - start
    _check_count(place)
    return seconds


def _copy_rows_seconds(place: CommandContext, plain: psycopg.Connection, rows: list[Row]) -> float:
    forget_jobs(place)
    start = perf_counter()
    with plain.transaction(), plain.cursor() as cursor, cursor.copy(f"{_COPY} (format binary)".encode()) as copy:
        copy.set_types(["uuid", "int8", "text", "text"])
        for row in rows:
            copy.write_row(row)
    seconds = perf_counter() - start
    _check_count(place)
    return seconds


def _copy_buffer_seconds(place: CommandContext, plain: psycopg.Connection, buffer: bytes) -> float:
    forget_jobs(place)
    start = perf_counter()
    with plain.transaction(), plain.cursor() as cursor, cursor.copy(_COPY.encode()) as copy:
        copy.write(buffer)
    seconds = perf_counter() - start
    _check_count(place)
    return seconds


def _check_count(place: CommandContext) -> None:
    with place.engine.begin() as connection:
        assert connection.execute(text("select count(*) from vectormill.items")).scalar_one() == _ROWS


BENCHMARK = Benchmark(name="submit_vs_copy", target=0.4, unit="rows/s", measure=measure)
