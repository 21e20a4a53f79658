"""Embeddings: vectors written by binary COPY, read by index, searched, and verified against items and chunks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import numpy.typing as npt
from psycopg import sql
from psycopg.types.json import set_json_loads
from sqlalchemy import Connection, text

from pipeline.core import exact_json
from pipeline.core.chunks import Item
from pipeline.core.options import PASSAGE_COLUMNS, VectorType
from pipeline.core.vectors import restored, stored
from pipeline.db import copy_format
from pipeline.db.database import copying, errors_as_sqlalchemys, psycopg_connection
from pipeline.db.partitions import leaf

#: Rows of jobs that don't split, and of those that do.
WHOLE = """(select job_id, index, key, tokens, truncated, vector, half, 0 as passage, null::int as start,
                   null::int as stop from vectormill.embeddings)"""
SPLIT = "vectormill.passages"
#: A number past any passage's.
_LAST_PASSAGE = 2**31 - 1
#: Columns before vector and key. The key comes last: all before it has a fixed size, so that numpy can lay out rows.
_FIXED = ("job_id", "index", "vector_space_id", "tokens", "truncated")
#: Rows per write: while Postgres takes them, the next ones are laid out.
_BLOCK = 1_000


class Passages(NamedTuple):
    """Passages that rows are of, as int32 columns."""

    #: Zero-based number within the item.
    number: npt.NDArray[np.int32]
    #: Characters of the item's text: `text[start:stop]`.
    start: npt.NDArray[np.int32]
    stop: npt.NDArray[np.int32]


def passage_named(number: int, start: int, stop: int) -> str:
    """Return a passage's name for the beginning of a message."""
    return f"passage {number:,} (characters {start:,} to {stop:,}): "


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedRows:
    """Embedded items or passages, as columns of equal length. An item's passages are all there, in order."""

    indexes: npt.NDArray[np.int64]
    keys: Sequence[str | None]
    #: float32 of shape (rows, dimensions).
    vectors: npt.NDArray[np.float32]
    #: Tokens that the model read, special tokens included.
    tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    #: One JSON object per row; empty where Postgres has the carried columns already, or there are none.
    carried: Sequence[bytes] = ()
    #: `None`: each row is of a whole item.
    passages: Passages | None = None
    #: Tokens that truncation left out of each row; empty: of none.
    lost_tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.indexes) if self.passages is None else int(np.count_nonzero(self.passages.number == 0))

    def passage_named(self, at: int) -> str:
        """Return a row's passage for the beginning of a message; empty if the row is of a whole item."""
        if self.passages is None:
            return ""
        return passage_named(*(int(column[at]) for column in self.passages))

    def select(self, mask: npt.NDArray[np.bool_]) -> "EmbeddedRows":
        """Return the rows where `mask` is true."""
        return EmbeddedRows(
            indexes=self.indexes[mask],
            keys=[key for key, keep in zip(self.keys, mask, strict=True) if keep],
            vectors=self.vectors[mask],
            tokens=self.tokens[mask],
            truncated=self.truncated[mask],
            carried=[row for row, keep in zip(self.carried, mask, strict=True) if keep] if self.carried else (),
            passages=self.passages and Passages(*(column[mask] for column in self.passages)),
            lost_tokens=self.lost_tokens[mask] if len(self.lost_tokens) else self.lost_tokens,
        )

    def copied(self, to: Mapping[int, Sequence[Item]], *, carried: bool) -> "EmbeddedRows":
        """Return copies of rows for other items, by the index of the row. `carried`: with the items' own columns."""
        found = [
            (at, item)
            for at in np.flatnonzero(np.isin(self.indexes, list(to))).tolist()
            for item in to[int(self.indexes[at])]
        ]
        found.sort(key=lambda copy: (copy[1].index, copy[0]))  # an item's passages in order
        at = np.array([row for row, _ in found], dtype=np.int64)
        return EmbeddedRows(
            indexes=np.array([item.index for _, item in found], dtype=np.int64),
            keys=[item.key for _, item in found],
            vectors=self.vectors[at],
            tokens=self.tokens[at],
            truncated=self.truncated[at],
            carried=[item.carried for _, item in found] if carried else (),
            passages=self.passages and Passages(*(column[at] for column in self.passages)),
            lost_tokens=self.lost_tokens[at] if len(self.lost_tokens) else self.lost_tokens,
        )

    def joined(self, more: "EmbeddedRows") -> "EmbeddedRows":
        """Return these rows and `more` of the same job, in the order of items and passages."""
        if not len(more.indexes) or not len(self.indexes):
            return more if len(more.indexes) else self
        indexes = np.concatenate([self.indexes, more.indexes])
        order = np.argsort(indexes, kind="stable")
        keys, carried = [*self.keys, *more.keys], [*self.carried, *more.carried]
        lost = [
            each.lost_tokens if len(each.lost_tokens) else np.zeros(len(each.indexes), np.int64)
            for each in (self, more)
        ]
        return EmbeddedRows(
            indexes=indexes[order],
            keys=[keys[at] for at in order.tolist()],
            vectors=np.concatenate([self.vectors, more.vectors])[order],
            tokens=np.concatenate([self.tokens, more.tokens])[order],
            truncated=np.concatenate([self.truncated, more.truncated])[order],
            carried=[carried[at] for at in order.tolist()] if carried else (),
            passages=self.passages
            and more.passages
            and Passages(*(np.concatenate(both)[order] for both in zip(self.passages, more.passages, strict=True))),
            lost_tokens=np.concatenate(lost)[order],
        )


NO_ROWS = EmbeddedRows(
    indexes=np.zeros(0, np.int64),
    keys=(),
    vectors=np.zeros((0, 0), np.float32),
    tokens=np.zeros(0, np.int32),
    truncated=np.zeros(0, np.bool_),
)


def _on_the_wire(kept_as: VectorType) -> "np.dtype[np.floating]":
    return np.dtype(kept_as.value).newbyteorder(">")


def _row_layout(dimensions: int, kept_as: VectorType, *, passages: bool) -> np.dtype[np.void]:
    # pgvector's binary form: int16 dimensions, int16 zero, then the elements, all big-endian.
    numbers = [(f"{name}{size}", kind) for name in PASSAGE_COLUMNS for size, kind in (("_size", ">i4"), ("", ">i4"))]
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
            *(numbers if passages else ()),
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
    """Append vectors to the column of their type, by COPY: to `passages` if they are of passages, else to `embeddings`.
    `table`: another one than the job's partition.
    """
    if len(rows.indexes) == 0:
        return
    dimensions, passages = rows.vectors.shape[1], rows.passages
    numbers = PASSAGE_COLUMNS if passages else ()
    layout = _row_layout(dimensions, kept_as, passages=bool(passages))
    fixed = np.empty(min(_BLOCK, len(rows.indexes)), dtype=layout)
    fixed["fields"], fixed["uuid_size"], fixed["job_id"] = 7 + len(numbers), 16, np.void(job_id.bytes)
    for name in numbers:
        fixed[f"{name}_size"] = 4
    fixed["index_size"], fixed["space_size"], fixed["space"] = 8, 8, vector_space_id
    fixed["tokens_size"], fixed["truncated_size"] = 4, 1
    fixed["vector_size"] = 4 + dimensions * kept_as.element_bytes
    fixed["dimensions"], fixed["zero"] = dimensions, 0
    columns = (*_FIXED, *numbers, kept_as.column, "key")
    with copying(connection, table or leaf("passages" if passages else "embeddings", job_id), columns) as copy:
        copy.write(copy_format.SIGNATURE)
        for start in range(0, len(rows.indexes), _BLOCK):
            part = slice(start, start + _BLOCK)
            block = fixed[: len(rows.indexes[part])]
            block["index"], block["tokens"] = rows.indexes[part], rows.tokens[part]
            block["truncated"], block["vector"] = rows.truncated[part], stored(rows.vectors[part], kept_as)
            for name, values in zip(numbers, passages or (), strict=True):
                block[name] = values[part]
            keys = [None if key is None else key.encode() for key in rows.keys[part]]
            copy.write(copy_format.frame(block, keys))
        copy.write(copy_format.TRAILER)


def _decode(wire: bytes, kept_as: VectorType) -> npt.NDArray[np.float32]:
    return restored(np.frombuffer(wire, dtype=_on_the_wire(kept_as), offset=4))


# A subquery per row, not a join: until statistics know a job, the planner expects one row of it, and may plan the join
# as a scan of all the job's items for each row.
_READ_OF = """
    select e.index, e.key, coalesce(vector_send(e.vector), halfvec_send(e.half)),
           case when e.half is null then 'float32' else 'float16' end,
           e.tokens, e.truncated, (select carried from vectormill.items where job_id = %s and index = e.index),
           e.passage, e.start, e.stop
    from {rows} e
    where e.job_id = %s and (e.index, e.passage) > (%s, %s) and e.index < %s order by e.index, e.passage
"""
_READ = {False: _READ_OF.format(rows=WHOLE), True: _READ_OF.format(rows=SPLIT)}
_PAGE = {False: _READ[False] + " limit %s", True: _READ[True] + " limit %s"}
#: Before the first row, and after the last one, of any job.
_ALL = (-1, _LAST_PASSAGE, 2**63 - 1)


class Vector(NamedTuple):
    """Vector of an item or a passage, as it is read."""

    index: int  # type: ignore[assignment] # nobody needs the method of tuples
    key: str | None
    #: float32 of shape (dimensions,).
    vector: npt.NDArray[np.float32]
    tokens: int
    truncated: bool
    carried: dict[str, Any] | None
    passage: int = 0
    #: Characters of the item's text; `None`: the whole text.
    start: int | None = None
    stop: int | None = None


def stream(connection: Connection, job_id: UUID, block: int = 2_000) -> Iterator[list[Vector]]:
    """Yield the vectors of a job that doesn't split in index order, in blocks. A server-side cursor bounds memory."""
    with psycopg_connection(connection).cursor(name="results", binary=True) as cursor:
        set_json_loads(exact_json.loads, cursor)
        cursor.itersize = block
        cursor.execute(_READ[False].encode(), (job_id, job_id, *_ALL))
        while rows := cursor.fetchmany(block):
            yield _as_read(rows)


def before(index: int) -> tuple[int, int]:
    """Return the place before an index, after which `page` reads on."""
    return index - 1, _LAST_PASSAGE


def page(
    connection: Connection, job_id: UUID, after: tuple[int, int], end_index: int, limit: int, *, passages: bool
) -> list[Vector]:
    """Return at most `limit` of a job's vectors past the index and passage `after`, with indexes before `end_index`, in
    order. `passages`: the job splits."""
    with psycopg_connection(connection).cursor(binary=True) as cursor:
        set_json_loads(exact_json.loads, cursor)
        cursor.execute(_PAGE[passages].encode(), (job_id, job_id, *after, end_index, limit))
        return _as_read(cursor.fetchall())


def _as_read(rows: Iterable[tuple[Any, ...]]) -> list[Vector]:
    return [
        Vector(index, key, _decode(wire, VectorType(kept_as)), tokens, truncated, carried, *passage)
        for index, key, wire, kept_as, tokens, truncated, carried, *passage in rows
    ]


_OF_ITEMS_OF = """
    select given.ordinal - 1, coalesce(vector_send(e.vector), halfvec_send(e.half)),
           case when e.half is null then 'float32' else 'float16' end, e.tokens, e.truncated, e.passage, e.start, e.stop
    from unnest(%s::uuid[], %s::bigint[]) with ordinality given(job_id, index, ordinal)
    -- "offset 0" keeps it a look-up for each item.
    cross join lateral (select * from {rows} r where r.job_id = given.job_id and r.index = given.index offset 0) e
    order by given.ordinal, e.passage
"""
_OF_ITEMS = {False: _OF_ITEMS_OF.format(rows=WHOLE), True: _OF_ITEMS_OF.format(rows=SPLIT)}


def of_items(connection: Connection, places: Sequence[tuple[UUID, int]], *, passages: bool) -> EmbeddedRows:
    """Return the vectors of items of any jobs, each given by job and index, as rows whose indexes are positions in
    `places`. Items without a vector have no row."""
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor(binary=True) as cursor:
        cursor.execute(_OF_ITEMS[passages].encode(), ([job for job, _ in places], [index for _, index in places]))
        rows = cursor.fetchall()
    if not rows:
        return NO_ROWS
    at, wires, kinds, tokens, truncated, *numbers = zip(*rows, strict=True)
    return EmbeddedRows(
        indexes=np.array(at, np.int64),
        keys=[None] * len(rows),
        vectors=np.stack([_decode(wire, VectorType(kind)) for wire, kind in zip(wires, kinds, strict=True)]),
        tokens=np.array(tokens, np.int32),
        truncated=np.array(truncated, np.bool_),
        passages=Passages(*(np.array(column, np.int32) for column in numbers)) if passages else None,
    )


_COUNT_BY_CHUNK_OF = """
    select coalesce(sum(greatest(0, c.vectors - v.items) + greatest(0, c.rejected - r.n)
                        + greatest(0, c.passages - v.passages, v.gaps)), 0)::bigint,
           coalesce(sum(greatest(0, v.items - c.vectors) + greatest(0, r.n - c.rejected)
                        + greatest(0, v.passages - c.passages)), 0)::bigint
    from (select job_id, first_index, items, embedded + reused - forgotten_vectors as vectors,
                 rejected - forgotten_rejects as rejected, passages - forgotten_passages as passages
          from vectormill.chunks) c
    -- Each item has its passages from 0 on; `start` is null where it has no passages.
    cross join lateral (select count(*) filter (where passage = 0) as items, count(start) as passages,
                          count(*) filter (where passage > 0 and not exists (
                            select from {rows} b
                            where b.job_id = :job and b.index = e.index and b.passage = e.passage - 1)) as gaps
                        from {rows} e where job_id = :job
                        and index >= c.first_index and index < c.first_index + c.items) v
    cross join lateral (select count(*) as n from vectormill.rejects where job_id = :job
                        and index >= c.first_index and index < c.first_index + c.items) r
    where c.job_id = :job
"""
_COUNT_BY_CHUNK = {False: _COUNT_BY_CHUNK_OF.format(rows=WHOLE), True: _COUNT_BY_CHUNK_OF.format(rows=SPLIT)}


def _count_by_chunk(connection: Connection, job_id: UUID, *, passages: bool) -> tuple[int, int]:
    """Return the number of vectors and rejects that chunks count but that don't exist, and of those that exist beyond
    the chunks' counts."""
    missing, double = connection.execute(
        text(_COUNT_BY_CHUNK[passages]),
        {"job": job_id},
    ).one()
    return missing, double


_VERIFY_OF = """
    select count(*) filter (where i.index is not null and e.index is null and r.index is null)
           - (select coalesce(sum(case when state in ('pending', 'running')
                                       then items - vacant - embedded - reused - rejected else cancelled end), 0)
              from vectormill.chunks where job_id = :job),
           count(*) filter (where i.index is null or (e.index is not null and r.index is not null))
    from (select index from vectormill.items where job_id = :job) i
    full join (select index from {rows} e where job_id = :job and passage = 0) e
           on e.index = i.index
    full join (select index from vectormill.rejects where job_id = :job) r
           on r.index = coalesce(i.index, e.index)
"""
_VERIFY = {False: _VERIFY_OF.format(rows=WHOLE), True: _VERIFY_OF.format(rows=SPLIT)}


def verify(connection: Connection, job_id: UUID, *, passages: bool) -> tuple[int, int]:
    """Return (missing, double) of a job whose items are in Postgres, as `pipeline.jobs.verification` defines them.
    `passages`: the job splits."""
    missing, double = _count_by_chunk(connection, job_id, passages=passages)
    without, strays = connection.execute(
        text(_VERIFY[passages]),
        {"job": job_id},
    ).one()
    cut_off = connection.execute(text(_CUT_OFF), {"job": job_id}).scalar_one() if passages else 0
    return max(missing, int(without), cut_off), max(double, strays)


#: Items whose last passage ends before their text does, or behind it; while texts are kept.
_CUT_OFF = """
    select count(*) from (
      select index, max(stop) as stop from vectormill.passages where job_id = :job group by index
    ) p join vectormill.items i on i.job_id = :job and i.index = p.index
    where i.text is not null and char_length(i.text) <> p.stop
"""


_VERIFY_WITHOUT_ITEMS_OF = """
    select (select coalesce(sum(greatest(0, items - vacant - embedded - reused - rejected - cancelled)), 0)::bigint
            from vectormill.chunks where job_id = :job and state in ('done', 'cancelled')),
           (select count(*)
            from (select index from {rows} e where job_id = :job and passage = 0) e
            full join (select index from vectormill.rejects where job_id = :job) r on r.index = e.index
            where (e.index is not null and r.index is not null)
               or coalesce(e.index, r.index) not between 0 and cast(:items as bigint) - 1)
"""
_VERIFY_WITHOUT_ITEMS = {
    False: _VERIFY_WITHOUT_ITEMS_OF.format(rows=WHOLE),
    True: _VERIFY_WITHOUT_ITEMS_OF.format(rows=SPLIT),
}


def verify_without_items(connection: Connection, job_id: UUID, items_total: int, *, passages: bool) -> tuple[int, int]:
    """Return (missing, double) of a job whose items are in files, by its chunks' ranges instead of the items.
    `passages`: the job splits."""
    missing, double = _count_by_chunk(connection, job_id, passages=passages)
    unaccounted, strays = connection.execute(
        text(_VERIFY_WITHOUT_ITEMS[passages]),
        {"job": job_id, "items": items_total},
    ).one()
    return missing + unaccounted, max(double, strays)
