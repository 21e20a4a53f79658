"""Commit of a whole chunk against `executemany` of the same rows into the same table."""

from time import perf_counter
from uuid import UUID, uuid4

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from uuid_utils.compat import uuid7

from pipeline.catalog.models import vector_space_of
from pipeline.chunk_io.commit import Commit, Ending, write_chunk
from pipeline.cli.context import CommandContext
from pipeline.core.chunks import ChunkState, Claim
from pipeline.db import chunks, partitions, staging
from pipeline.db.embeddings import EmbeddedRows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, forget_jobs, model_named, servers

_ROWS = 10_000
#: Chunks per measurement: one alone takes a tenth of a second, too short to even out the machine's other work.
_CHUNKS = 5
_DIMENSIONS = 384
_VECTOR_SPACE = 1
_LEASE_SECONDS = 60.0
_INSERT = """
    insert into vectormill.embeddings (job_id, index, key, vector_space_id, tokens, truncated, vector)
    values (%s, %s, %s, %s, %s, %s, %s)
"""


def measure(rounds: Rounds) -> Values:
    """Return rows per second of both, each into tables that were empty before."""
    rows = _rows()
    with (
        servers() as running,
        connected(running) as place,
        psycopg.connect(running.database_url) as plain,
    ):
        register_vector(plain)
        plain.commit()
        return rounds.interleave(
            {
                "write-back": lambda _: _CHUNKS * _ROWS / _write_back_seconds(place, rows),
                "executemany": lambda _: _CHUNKS * _ROWS / _executemany_seconds(place, plain, rows),
            }
        )


def _rows() -> EmbeddedRows:
    vectors = np.random.default_rng(0).standard_normal((_ROWS, _DIMENSIONS), dtype=np.float32)
    return EmbeddedRows(
        indexes=np.arange(_ROWS, dtype=np.int64),
        keys=[f"row-{n}" for n in range(_ROWS)],
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        tokens=np.full(_ROWS, 80, dtype=np.int32),
        truncated=np.zeros(_ROWS, dtype=np.bool_),
    )


def _write_back_seconds(place: CommandContext, rows: EmbeddedRows) -> float:
    forget_jobs(place)
    claims = [_claim(place) for _ in range(_CHUNKS)]
    start = perf_counter()
    for claim in claims:
        write_chunk(place.engine, claim, 0, Commit(rows=rows, device_seconds=1.0), Ending(state=ChunkState.DONE))
    return perf_counter() - start


def _claim(place: CommandContext) -> Claim:
    """Make a job of one chunk, and claim the chunk."""
    job_id = uuid7()
    producer = _insert_job(place, job_id)
    with place.engine.begin() as connection:
        planned = chunks.NewChunk(ordinal=0, first_index=0, items=_ROWS, estimated_tokens=80 * _ROWS, rejected=0)
        chunks.insert_chunks(connection, job_id, [planned])
        staging.queue(connection, producer, items_total=_ROWS, max_rejects=None, payload="")
    with place.engine.begin() as connection:
        ((chunk_id, _),) = chunks.pending_after(connection, job_id, 0, 2)
        claim = chunks.claim(
            connection, job_id, chunk_id, worker_id=uuid4(), task_id="benchmark", lease_seconds=_LEASE_SECONDS
        )
    assert claim
    return claim


def _insert_job(place: CommandContext, job_id: UUID) -> staging.Producer:
    model = model_named(place)
    with place.engine.begin() as connection:
        partitions.make_month(connection, partitions.month_of(job_id))
        producer = staging.begin(
            connection,
            staging.NewJob(
                id=job_id,
                workspace_id=place.workspace_id,
                name="benchmark",
                model_name=model.name,
                vector_space_id=vector_space_of(connection, model, dimensions=None, max_item_tokens=None),
                lease_seconds=_LEASE_SECONDS,
            ),
        )
    assert producer
    return producer


def _executemany_seconds(place: CommandContext, plain: psycopg.Connection, rows: EmbeddedRows) -> float:
    forget_jobs(place)
    made = [_values(rows, uuid7()) for _ in range(_CHUNKS)]
    start = perf_counter()
    for values in made:
        with plain.transaction(), plain.cursor() as cursor:
            cursor.executemany(_INSERT, values)
    return perf_counter() - start


def _values(rows: EmbeddedRows, job_id: UUID) -> list[tuple[object, ...]]:
    columns = (rows.indexes.tolist(), rows.keys, rows.tokens.tolist(), rows.truncated.tolist(), rows.vectors)
    return [
        (job_id, index, key, _VECTOR_SPACE, tokens, truncated, vector)
        for index, key, tokens, truncated, vector in zip(*columns, strict=True)
    ]


BENCHMARK = Benchmark(name="write_back_vs_executemany", target=3, unit="rows/s", measure=measure)
