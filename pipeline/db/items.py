"""Items, and the rejects that are written with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
import numpy.typing as npt
from psycopg import sql
from sqlalchemy import Connection, RowMapping, and_, delete, text

from pipeline.core.chunks import Item, Reject
from pipeline.db import copy_format
from pipeline.db.database import copying, errors_as_sqlalchemys, psycopg_connection
from pipeline.db.embeddings import EmbeddedRows
from pipeline.db.partitions import leaf
from pipeline.db.tables import SCHEMA, metadata

_Indexes = Sequence[int] | range | npt.NDArray[np.int64]
#: Version number, with which jsonb's binary form starts.
_JSONB = b"\x01"
_HEAD = [("fields", ">i2"), ("uuid_size", ">i4"), ("job_id", "V16"), ("index_size", ">i4"), ("index", ">i8")]


def _heads(job_id: UUID, indexes: _Indexes, fields: int) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    heads = np.empty(len(indexes), dtype=_HEAD)
    heads["fields"] = fields
    heads["uuid_size"] = 16
    heads["job_id"] = np.void(job_id.bytes)
    heads["index_size"] = 8
    heads["index"] = indexes
    return heads


def _encoded(keys: Sequence[str | None]) -> list[bytes | None]:
    return [None if key is None else key.encode() for key in keys]


@dataclass(frozen=True, slots=True)
class Block:
    """Items to be written, in order. A text of `None` belongs to a reject, or stays in its file."""

    keys: Sequence[str | None]
    texts: Sequence[bytes | None]
    #: One JSON object per item, where the job carries columns.
    carried: Sequence[bytes] | None
    #: UTF-8, where passages get titles.
    titles: Sequence[bytes] | None = None
    #: Hashes of text and carried columns, in a sync.
    identities: Sequence[bytes | None] | None = None
    #: Positions of the items, counted from the first index; `None`: they are consecutive.
    places: npt.NDArray[np.int64] | None = None


def copy_items(
    connection: Connection,
    job_id: UUID,
    first_index: int,
    blocks: Sequence[Block],
    *,
    table: sql.Identifier | None = None,
) -> None:
    """Append items from `first_index` on, by COPY; a block with `places` is the only one. `table`: another one than the
    job's partition."""
    carried = ("carried",) if blocks[0].carried is not None else ()
    title = ("title",) if blocks[0].titles is not None else ()
    identity = ("identity",) if blocks[0].identities is not None else ()
    names = ("job_id", "index", "key", "text", *carried, *title, *identity)
    with copying(connection, table or leaf("items", job_id), names) as copy:
        copy.write(copy_format.SIGNATURE)
        for block in blocks:
            consecutive = range(first_index, first_index + len(block.keys))
            indexes = consecutive if block.places is None else first_index + block.places
            heads = _heads(job_id, indexes, len(names))
            rest: list[Sequence[bytes | None]] = []
            if block.carried is not None:
                rest.append([_JSONB + row for row in block.carried])
            if block.titles is not None:
                rest.append(block.titles)
            if block.identities is not None:
                rest.append(block.identities)
            copy.write(copy_format.frame(heads, _encoded(block.keys), block.texts, *rest))
            first_index += len(block.keys)
        copy.write(copy_format.TRAILER)


def copy_rejects(connection: Connection, job_id: UUID, rejects: Sequence[Reject]) -> None:
    """Append rejects, by COPY."""
    if not rejects:
        return
    names = ("job_id", "index", "key", "code", "message")
    columns = (
        _encoded([reject.key for reject in rejects]),
        _encoded([reject.code.value for reject in rejects]),
        _encoded([reject.message for reject in rejects]),
    )
    with copying(connection, leaf("rejects", job_id), names) as copy:
        copy.write(copy_format.SIGNATURE)
        copy.write(copy_format.frame(_heads(job_id, [reject.index for reject in rejects], len(names)), *columns))
        copy.write(copy_format.TRAILER)


def copy_carried(connection: Connection, job_id: UUID, rows: EmbeddedRows) -> None:
    """Append the carried columns of embedded items that have no row yet, since they were read from a file."""
    if rows.passages is not None:
        rows = rows.select(rows.passages.number == 0)
    names = ("job_id", "index", "key", "carried")
    with copying(connection, leaf("items", job_id), names) as copy:
        copy.write(copy_format.SIGNATURE)
        heads = _heads(job_id, rows.indexes, len(names))
        copy.write(copy_format.frame(heads, _encoded(rows.keys), [_JSONB + row for row in rows.carried]))
        copy.write(copy_format.TRAILER)


_READ = """
    select index, key, text, case when %s then carried::text end, title from vectormill.items
    where job_id = %s and index >= %s and index < %s and text is not null order by index
"""


def read(connection: Connection, job_id: UUID, first_index: int, count: int, *, carried: bool) -> list[Item]:
    """Return the items of a range that have a text, in index order; with their carried columns, if asked."""
    # By psycopg alone: there may be many rows, and SQLAlchemy would wrap each.
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor(binary=True) as cursor:
        cursor.execute(_READ, (carried, job_id, first_index, first_index + count))
        return [
            Item(index=index, key=key, text=body, carried=(more or "").encode(), title=title or "")
            for index, key, body, more, title in cursor
        ]


def indexes(connection: Connection, job_id: UUID, first_index: int, count: int) -> set[int]:
    """Return the indexes of a range that are items of the job."""
    found = text("""
        select index from vectormill.items where job_id = :job and index >= :first and index < :end
    """)
    values = {"job": job_id, "first": first_index, "end": first_index + count}
    return set(connection.execute(found, values).scalars())


def settled(connection: Connection, job_id: UUID, first_index: int, count: int) -> set[int]:
    """Return the indexes in a range that have a vector or a reject in Postgres."""
    rows = connection.execute(
        text("""
            select index from vectormill.embeddings where job_id = :job and index >= :first and index < :end
            union all
            select index from vectormill.passages
            where job_id = :job and index >= :first and index < :end and passage = 0
            union all
            select index from vectormill.rejects where job_id = :job and index >= :first and index < :end
        """),
        {"job": job_id, "first": first_index, "end": first_index + count},
    )
    return set(rows.scalars())


# A subquery per row for each other table, not a join, for the reason that embeddings.py gives.
def unsettled(connection: Connection, job_id: UUID, after: int, limit: int) -> list[RowMapping]:
    """Return a page of a job's items that have neither vector nor reject in Postgres, in index order, past index
    `after`. The job doesn't split."""
    rows = connection.execute(
        text("""
            select i.index, i.key, i.carried from vectormill.items i
            where i.job_id = :job and i.index > :after
              and (select e.index from vectormill.embeddings e where e.job_id = :job and e.index = i.index) is null
              and (select r.index from vectormill.rejects r where r.job_id = :job and r.index = i.index) is null
            order by i.index limit :limit
        """),
        {"job": job_id, "after": after, "limit": limit},
    )
    return list(rows.mappings())


def first_without_key(connection: Connection, job_id: UUID) -> int | None:
    """Return the index of a job's first item with a text and no key; None if there is none."""
    return connection.execute(
        text("""
            select index from vectormill.items where job_id = :job and key is null and text is not null
            order by index limit 1
        """),
        {"job": job_id},
    ).scalar_one_or_none()


def first_duplicate_key(connection: Connection, job_id: UUID) -> tuple[str, int, int] | None:
    """Return a key that occurs more than once in a job, with its first two indexes; None if all are unique."""
    row = connection.execute(
        text("""
            select key, min(index), (array_agg(index order by index))[2] from vectormill.items
            where job_id = :job and key is not null group by key having count(*) > 1 order by 2 limit 1
        """),
        {"job": job_id},
    ).one_or_none()
    return (row[0], row[1], row[2]) if row else None


def delete_some(connection: Connection, job_id: UUID, limit: int) -> int:
    """Delete up to `limit` items and their rejects, as a step of undoing a submission. Return the number of items."""
    connection.execute(
        text("""
            delete from vectormill.rejects where job_id = :job and index in
              (select index from vectormill.items where job_id = :job order by index limit :limit)
        """),
        {"job": job_id, "limit": limit},
    )
    return connection.execute(
        text("""
            delete from vectormill.items where job_id = :job and index in
              (select index from vectormill.items where job_id = :job order by index limit :limit)
        """),
        {"job": job_id, "limit": limit},
    ).rowcount


def delete_range(connection: Connection, table: str, job_id: UUID, first_index: int, count: int) -> int:
    """Delete a job's rows in a range of indexes from a table that has partitions. Return their number."""
    rows = metadata.tables[f"{SCHEMA}.{table}"]
    of_range = and_(rows.c.index >= first_index, rows.c.index < first_index + count)
    return connection.execute(delete(rows).where(rows.c.job_id == job_id, of_range)).rowcount


def remove_texts(connection: Connection, job_id: UUID, first_index: int, count: int) -> None:
    """Remove the texts of a range of items; keys and indexes stay."""
    connection.execute(
        text("""
            update vectormill.items set text = null, title = null
            where job_id = :job and index >= :first and index < :end and (text is not null or title is not null)
        """),
        {"job": job_id, "first": first_index, "end": first_index + count},
    )
