"""Factories of models, jobs and claims, through the store's own functions, and readers of the outcome."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from sqlalchemy import Engine, RowMapping, text
from uuid_utils.compat import uuid7

from pipeline.catalog.models import add_model, find_model, vector_space_of, workspace_id
from pipeline.chunk_io.commit import Commit, Ending
from pipeline.chunk_io.reader import read_chunk
from pipeline.core.chunks import ChunkState, Claim, Item, Reject, RejectCode
from pipeline.core.models import Model
from pipeline.core.options import KeptOptions
from pipeline.db import chunks, items, staging, tables
from pipeline.db.embeddings import EmbeddedRows

#: Dimensions of the vectors of jobs made here.
DIMENSIONS = 4
WORKER = uuid4()
DONE, RUNNING, PENDING = (Ending(state=state) for state in (ChunkState.DONE, ChunkState.RUNNING, ChunkState.PENDING))


def make_model(engine: Engine, name: str = "small", *, tokens_per_second: float = 1000.0) -> Model:
    """Add a model that can't be loaded, which is enough for all that happens in Postgres."""
    description = {
        "path": f"/models/{name}",
        "weights_sha256": name,
        "weights_bytes": 1,
        "dimensions": DIMENSIONS,
        "max_item_tokens": 256,
        "normalised": True,
        "canary": "00000000",
        "tokens_per_second": tokens_per_second,
    }
    with engine.begin() as connection:
        add_model(connection, name, description)
        return find_model(connection, workspace_id(connection), name)


def make_job(
    engine: Engine,
    model: Model,
    count: int = 8,
    *,
    per_chunk: int = 4,
    rejected: Mapping[int, RejectCode] = {},
    max_rejects: int | None = None,
    workspace: int | None = None,
    job_id: UUID | None = None,
    **columns: Any,
) -> UUID:
    """Queue a job of `count` items, `text 0` with key `k0` and so on. Items in `rejected` were rejected at reading."""
    job_id = job_id or uuid7()
    with engine.begin() as connection:
        space = vector_space_of(connection, model, dimensions=None, max_item_tokens=None)
        new = staging.NewJob(
            id=job_id,
            workspace_id=workspace or workspace_id(connection),
            name=columns.pop("name", "made"),
            options=KeptOptions.from_json(columns.pop("options", {})),
            model_name=model.name,
            vector_space_id=space,
            lease_seconds=30,
            **columns,
        )
        producer = staging.begin(connection, new)
        assert producer
        texts = [None if at in rejected else f"text {at}".encode() for at in range(count)]
        items.copy_items(connection, job_id, 0, [items.Block([f"k{at}" for at in range(count)], texts, None)])
        items.copy_rejects(connection, job_id, [reject(at, code) for at, code in rejected.items()])
        planned = [
            chunks.NewChunk(
                ordinal=ordinal,
                first_index=first,
                items=min(per_chunk, count - first),
                estimated_tokens=10,
                rejected=len([at for at in rejected if first <= at < first + per_chunk]),
            )
            for ordinal, first in enumerate(range(0, count, per_chunk))
        ]
        chunks.insert_chunks(connection, job_id, planned)
        staging.queue(connection, producer, items_total=count, max_rejects=max_rejects, payload="")
    return job_id


def reject(index: int, code: RejectCode = RejectCode.BAD_VECTOR) -> Reject:
    """Return a reject of an item of `make_job`."""
    return Reject(index=index, key=f"k{index}", code=code, message="for a test")


def take(
    engine: Engine,
    job_id: UUID,
    ordinal: int = 0,
    *,
    lease_seconds: float = 30,
    worker: UUID = WORKER,
    task: str = "task",
) -> Claim | None:
    """Claim a chunk. A negative lease has expired at once."""
    chunk_id = chunk_ids(engine, job_id)[ordinal]
    with engine.begin() as connection:
        return chunks.claim(connection, job_id, chunk_id, worker_id=worker, task_id=task, lease_seconds=lease_seconds)


def taken(engine: Engine, job_id: UUID, ordinal: int = 0, **how: Any) -> Claim:
    """Claim a chunk, which must succeed."""
    claim = take(engine, job_id, ordinal, **how)
    assert claim
    return claim


def unfinished(engine: Engine, claim: Claim) -> list[Item]:
    """Return the items that the claim is to embed."""
    return [item for block in read_chunk(engine, claim).blocks for item in block.items]


def vectors_of(indexes: Sequence[int], dimensions: int = DIMENSIONS) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return a vector for each index, always the same one. Its first element is the index."""
    made = np.random.default_rng(7).random((max(indexes, default=0) + 1, dimensions)).astype(np.float32)
    made[:, 0] = np.arange(len(made))
    return made[np.array(indexes, dtype=np.int64)]


def part_of(indexes: Sequence[int], rejects: Sequence[Reject] = ()) -> Commit:
    """Return a commit with vectors for `indexes`, three tokens each."""
    rows = EmbeddedRows(
        indexes=np.array(indexes, dtype=np.int64),
        keys=[f"k{index}" for index in indexes],
        vectors=vectors_of(indexes),
        tokens=np.full(len(indexes), 3, dtype=np.int32),
        truncated=np.zeros(len(indexes), dtype=np.bool_),
    )
    return Commit(rows=rows, rejects=rejects, device_seconds=0.5)


def chunk_ids(engine: Engine, job_id: UUID) -> list[int]:
    """Return the ids of a job's chunks, in order."""
    return [row["id"] for row in chunk_rows(engine, job_id)]


def chunk_rows(engine: Engine, job_id: UUID) -> list[RowMapping]:
    """Return a job's chunks, in order."""
    statement = tables.chunks.select().where(tables.chunks.c.job_id == job_id).order_by(tables.chunks.c.ordinal)
    with engine.begin() as connection:
        return list(connection.execute(statement).mappings())


def job_row(engine: Engine, job_id: UUID) -> RowMapping:
    """Return a job's row."""
    with engine.begin() as connection:
        return connection.execute(tables.jobs.select().where(tables.jobs.c.id == job_id)).mappings().one()


def run_sql(engine: Engine, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """Run a statement of the test's own, and return its rows."""
    with engine.begin() as connection:
        result = connection.execute(text(statement), values)
        return [tuple(row) for row in result] if result.returns_rows else []


def count(engine: Engine, table: str) -> int:
    """Return the number of rows in a table."""
    return int(run_sql(engine, f"select count(*) from vectormill.{table}")[0][0])
