"""Embeddings: vectors written by binary COPY, read by index, searched, and verified against items and chunks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
from psycopg import sql
from psycopg.types.json import set_json_loads
from sqlalchemy import Connection, text

from pipeline.core import exact_json
from pipeline.core.options import VectorType
from pipeline.core.vectors import restored, stored
from pipeline.db import copy_format
from pipeline.db.database import copying, psycopg_connection
from pipeline.db.partitions import leaf

#: Columns before vector and key. The key comes last: all before it has a fixed size, so that numpy can lay out rows.
_FIXED = ("job_id", "index", "vector_space_id", "tokens", "truncated")
#: Rows per write: while Postgres takes them, the next ones are laid out.
_BLOCK = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedRows:
    """Embedded items, as columns of equal length."""

    indexes: npt.NDArray[np.int64]
    keys: Sequence[str | None]
    #: float32 of shape (items, dimensions).
    vectors: npt.NDArray[np.float32]
    #: Tokens that the model read, special tokens included.
    tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    #: One JSON object per item; empty where Postgres has the carried columns already, or there are none.
    carried: Sequence[bytes] = ()


NO_ROWS = EmbeddedRows(
    indexes=np.zeros(0, np.int64),
    keys=(),
    vectors=np.zeros((0, 0), np.float32),
    tokens=np.zeros(0, np.int32),
    truncated=np.zeros(0, np.bool_),
)


def _on_the_wire(kept_as: VectorType) -> "np.dtype[np.floating]":
    return np.dtype(kept_as.value).newbyteorder(">")


def _row_layout(dimensions: int, kept_as: VectorType) -> np.dtype[np.void]:
    # pgvector's binary form: int16 dimensions, int16 zero, then the elements, all big-endian.
    return np.dtype(
        [
            ("fields", ">i2"),
            ("uuid_size", ">i4"),
            ("job_id", "V16"),
            ("index_size", ">i4"),
            ("index", ">i8"),
            ("space_size", ">i4"),
            ("space", ">i8"),
            ("tokens_size", ">i4"),
            ("tokens", ">i4"),
            ("truncated_size", ">i4"),
            ("truncated", "?"),
            ("vector_size", ">i4"),
            ("dimensions", ">i2"),
            ("zero", ">i2"),
            ("vector", _on_the_wire(kept_as), (dimensions,)),
        ]
    )


def copy_rows(
    connection: Connection,
    job_id: UUID,
    vector_space_id: int,
    rows: EmbeddedRows,
    kept_as: VectorType,
    *,
    table: sql.Identifier | None = None,
) -> None:
    """Append vectors to the column of their type, by COPY. `table`: another one than the job's partition."""
    if len(rows.indexes) == 0:
        return
    dimensions = rows.vectors.shape[1]
    fixed = np.empty(min(_BLOCK, len(rows.indexes)), dtype=_row_layout(dimensions, kept_as))
    fixed["fields"], fixed["uuid_size"], fixed["job_id"] = 7, 16, np.void(job_id.bytes)
    fixed["index_size"], fixed["space_size"], fixed["space"] = 8, 8, vector_space_id
    fixed["tokens_size"], fixed["truncated_size"] = 4, 1
    fixed["vector_size"] = 4 + dimensions * kept_as.element_bytes
    fixed["dimensions"], fixed["zero"] = dimensions, 0
    with copying(connection, table or leaf("embeddings", job_id), (*_FIXED, kept_as.column, "key")) as copy:
        copy.write(copy_format.SIGNATURE)
        for start in range(0, len(rows.indexes), _BLOCK):
            part = slice(start, start + _BLOCK)
            block = fixed[: len(rows.indexes[part])]
            block["index"], block["tokens"] = rows.indexes[part], rows.tokens[part]
            block["truncated"], block["vector"] = rows.truncated[part], stored(rows.vectors[part], kept_as)
            keys = [None if key is None else key.encode() for key in rows.keys[part]]
            copy.write(copy_format.frame(block, keys))
        copy.write(copy_format.TRAILER)


def _decode(wire: bytes, kept_as: VectorType) -> npt.NDArray[np.float32]:
    return restored(np.frombuffer(wire, dtype=_on_the_wire(kept_as), offset=4))


# A subquery per row, not a join: until statistics know a job, the planner expects one row of it, and may plan the join
# as a scan of all the job's items for each row.
_READ = """
    select e.index, e.key, coalesce(vector_send(e.vector), halfvec_send(e.half)),
           case when e.half is null then 'float32' else 'float16' end,
           e.tokens, e.truncated, (select carried from vectormill.items where job_id = %s and index = e.index)
    from vectormill.embeddings e
    where e.job_id = %s and e.index >= %s and e.index < %s order by e.index
"""
_ALL = (0, 2**63 - 1)


def stream(connection: Connection, job_id: UUID, block: int = 2_000) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a job's vectors in index order, in blocks of (index, key, vector as float32 array, tokens, truncated,
    carried). A server-side cursor bounds memory."""
    with psycopg_connection(connection).cursor(name="results", binary=True) as cursor:
        set_json_loads(exact_json.loads, cursor)
        cursor.itersize = block
        cursor.execute(_READ, (job_id, job_id, *_ALL))
        while rows := cursor.fetchmany(block):
            yield _as_read(rows)


def page(connection: Connection, job_id: UUID, first_index: int, end_index: int, limit: int) -> list[tuple[Any, ...]]:
    """Return at most `limit` of a job's vectors with indexes from `first_index` to before `end_index`, as `stream`
    gives them."""
    with psycopg_connection(connection).cursor(binary=True) as cursor:
        set_json_loads(exact_json.loads, cursor)
        cursor.execute(_READ + " limit %s", (job_id, job_id, first_index, end_index, limit))
        return _as_read(cursor.fetchall())


def _as_read(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [
        (index, key, _decode(wire, VectorType(kept_as)), tokens, truncated, carried)
        for index, key, wire, kept_as, tokens, truncated, carried in rows
    ]


def nearest(
    connection: Connection, job_id: UUID, query: Sequence[float], limit: int
) -> list[tuple[int, str | None, float, str | None]]:
    """Return the items of a job nearest to `query` by cosine: (index, key, similarity, text if still kept)."""
    rows = connection.execute(
        text("""
            select e.index, e.key, 1 - (coalesce(e.vector, e.half::vector) <=> cast(:query as vector)) as similarity,
                   (select text from vectormill.items where job_id = :job and index = e.index)
            from vectormill.embeddings e where e.job_id = :job
            order by coalesce(e.vector, e.half::vector) <=> cast(:query as vector), e.index limit :limit
        """),
        {"job": job_id, "query": "[" + ",".join(repr(float(x)) for x in query) + "]", "limit": limit},
    )
    return [(row[0], row[1], float(row[2]), row[3]) for row in rows]


def _count_by_chunk(connection: Connection, job_id: UUID) -> tuple[int, int]:
    """Return the number of vectors and rejects that chunks count but that don't exist, and of those that exist beyond
    the chunks' counts."""
    missing, double = connection.execute(
        text("""
            select coalesce(sum(greatest(0, c.embedded + c.reused - v.n) + greatest(0, c.rejected - r.n)), 0)::bigint,
                   coalesce(sum(greatest(0, v.n - c.embedded - c.reused) + greatest(0, r.n - c.rejected)), 0)::bigint
            from vectormill.chunks c
            cross join lateral (select count(*) as n from vectormill.embeddings where job_id = :job
                                and index >= c.first_index and index < c.first_index + c.items) v
            cross join lateral (select count(*) as n from vectormill.rejects where job_id = :job
                                and index >= c.first_index and index < c.first_index + c.items) r
            where c.job_id = :job
        """),
        {"job": job_id},
    ).one()
    return missing, double


def verify(connection: Connection, job_id: UUID) -> tuple[int, int]:
    """Return (missing, double) of a job whose items are in Postgres, as `pipeline.jobs.verification` defines them."""
    missing, double = _count_by_chunk(connection, job_id)
    without, strays = connection.execute(
        text("""
            select count(*) filter (where i.index is not null and e.index is null and r.index is null)
                   - (select coalesce(sum(case when state in ('pending', 'running')
                                               then items - embedded - reused - rejected else cancelled end), 0)
                      from vectormill.chunks where job_id = :job),
                   count(*) filter (where i.index is null or (e.index is not null and r.index is not null))
            from (select index from vectormill.items where job_id = :job) i
            full join (select index from vectormill.embeddings where job_id = :job) e on e.index = i.index
            full join (select index from vectormill.rejects where job_id = :job) r
                   on r.index = coalesce(i.index, e.index)
        """),
        {"job": job_id},
    ).one()
    return max(missing, int(without)), max(double, strays)


def verify_without_items(connection: Connection, job_id: UUID, items_total: int) -> tuple[int, int]:
    """Return (missing, double) of a job whose items are in files, by its chunks' ranges instead of the items."""
    missing, double = _count_by_chunk(connection, job_id)
    unaccounted, strays = connection.execute(
        text("""
            select (select coalesce(sum(greatest(0, items - embedded - reused - rejected - cancelled)), 0)::bigint
                    from vectormill.chunks where job_id = :job and state in ('done', 'cancelled')),
                   (select count(*) from (select index from vectormill.embeddings where job_id = :job) e
                    full join (select index from vectormill.rejects where job_id = :job) r on r.index = e.index
                    where (e.index is not null and r.index is not null)
                       or coalesce(e.index, r.index) not between 0 and cast(:items as bigint) - 1)
        """),
        {"job": job_id, "items": items_total},
    ).one()
    return missing + unaccounted, max(double, strays)
