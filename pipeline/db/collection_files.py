"""Parquet files of collections' versions: which count, and the rows that the next ones get."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from psycopg.types.json import set_json_loads
from sqlalchemy import Connection, text

from pipeline.core import exact_json
from pipeline.db.database import errors_as_sqlalchemys, psycopg_connection


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionFile:
    """Parquet file that counts."""

    name: str
    #: Number of the set that it came with.
    number: int
    rows: int
    bytes: int


class Row(NamedTuple):
    """Vector of a key, or of one of its passages; without a vector, a key that went."""

    key: str
    tokens: int | None
    carried: dict[str, Any] | None
    passage: int | None
    start: int | None
    stop: int | None
    #: As pgvector sends it.
    vector: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesState:
    """State of a version's files."""

    #: Number of the newest set, and of the one that readers see.
    number: int
    shown: int
    compacts: bool
    #: Keys have changed since the newest set.
    changed: bool
    written_at: datetime | None
    problem: str | None
    files: int
    rows: int
    bytes: int

    @property
    def is_behind(self) -> bool:
        """True if something is still to be written."""
        return self.changed or self.compacts or self.shown < self.number


def due(connection: Connection, limit: int) -> Sequence[int]:
    """Return versions whose files are behind, and of which no sync goes on that began since."""
    rows = connection.execute(
        text("""
            select v.id from vectormill.collection_versions v
            where v.output is not null and v.state <> 'gone'
              and (v.compacts or v.output_shown < v.output_number or (
                exists (select from vectormill.collection_changes c where c.version_id = v.id)
                and (not exists (select from vectormill.jobs j
                                 where j.version_id = v.id and j.state not in ('completed', 'failed', 'cancelled'))
                     or exists (select from vectormill.syncs s
                                where s.version_id = v.id and s.settled_at > coalesce(v.output_at, '-infinity')))))
            order by v.output_at nulls first, v.id limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def state(connection: Connection, version_id: int) -> FilesState:
    """Return the state of a version's files."""
    row = connection.execute(
        text("""
            select v.output_number as number, v.output_shown as shown, v.compacts, v.output_at as written_at,
                   v.output_problem as problem,
                   exists (select from vectormill.collection_changes c where c.version_id = v.id) as changed,
                   count(f.name) as files, coalesce(sum(f.rows), 0)::bigint as rows,
                   coalesce(sum(f.bytes), 0)::bigint as bytes
            from vectormill.collection_versions v left join vectormill.collection_files f on f.version_id = v.id
            where v.id = :version group by v.id
        """),
        {"version": version_id},
    )
    return FilesState(**row.mappings().one())


def of_version(connection: Connection, version_id: int) -> list[CollectionFile]:
    """Return the files of a version that count, the oldest first."""
    rows = connection.execute(
        text("""
            select name, number, rows, bytes from vectormill.collection_files
            where version_id = :version order by number, name
        """),
        {"version": version_id},
    )
    return [CollectionFile(**row) for row in rows.mappings()]


_VECTORS = """
    select v.passage, v.start, v.stop, coalesce(vector_send(v.vector), halfvec_send(v.half)) as vector
    from vectormill.collection_vectors v
    where v.version_id = %(version)s and v.slot = k.slot order by v.passage offset 0
"""
_EVERY = """
    select k.key, k.tokens, k.carried, v.*
    from vectormill.collection_keys k cross join lateral ({VECTORS}) v
    where k.version_id = %(version)s order by k.key
"""
_CHANGED = """
    select c.key, k.tokens, k.carried, v.*
    from (select distinct key from vectormill.collection_changes where version_id = %(version)s) c
    left join lateral (select slot, tokens, carried from vectormill.collection_keys k
                       where k.version_id = %(version)s and k.key = c.key offset 0) k on true
    left join lateral ({VECTORS}) v on true
    order by c.key
"""
_ROWS = {True: _EVERY.format(VECTORS=_VECTORS), False: _CHANGED.format(VECTORS=_VECTORS)}


def rows(connection: Connection, version_id: int, *, full: bool, block: int) -> Iterator[list[Row]]:
    """Yield a version's rows in blocks, by key and passage: of the keys that changed, or all of a `full` set. A cursor
    of the server bounds memory."""
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor(name="files", binary=True) as cursor:
        set_json_loads(exact_json.loads, cursor)
        cursor.itersize = block
        cursor.execute(_ROWS[full].encode(), {"version": version_id})
        while page := cursor.fetchmany(block):
            yield [Row(*row) for row in page]


def begin_set(connection: Connection) -> None:
    """Let a transaction stay open while files are written, which takes longer than others may idle."""
    connection.execute(text("set local idle_in_transaction_session_timeout = '10min'"))


def end_set(
    connection: Connection, version_id: int, number: int, files: Sequence[CollectionFile], *, full: bool
) -> None:
    """Let the files of set `number` count, which is all of a `full` one, and forget the changes that it has."""
    for statement in (_FORGET_CHANGES, *([_FORGET_FILES] if full else [])):
        connection.execute(text(statement), {"version": version_id})
    for file in files:
        _record(connection, version_id, file)
    connection.execute(
        text("""
            update vectormill.collection_versions
            set output_number = :number, output_at = now(), compacts = compacts and not :full where id = :version
        """),
        {"version": version_id, "number": number, "full": full},
    )


_FORGET_CHANGES = "delete from vectormill.collection_changes where version_id = :version"
_FORGET_FILES = "delete from vectormill.collection_files where version_id = :version"


def _record(connection: Connection, version_id: int, file: CollectionFile) -> None:
    connection.execute(
        text("""
            insert into vectormill.collection_files (version_id, name, number, rows, bytes)
            values (:version, :name, :number, :rows, :bytes)
        """),
        {"version": version_id, "name": file.name, "number": file.number, "rows": file.rows, "bytes": file.bytes},
    )


def replace(connection: Connection, version_id: int, name: str, by: CollectionFile | None) -> None:
    """Let a file count no more, but `by`, in a set of its own. `None`: nothing is left of it."""
    connection.execute(
        text("delete from vectormill.collection_files where version_id = :version and name = :name"),
        {"version": version_id, "name": name},
    )
    if by:
        _record(connection, version_id, by)
    connection.execute(
        text("update vectormill.collection_versions set output_number = output_number + 1 where id = :version"),
        {"version": version_id},
    )


def forget_changes(connection: Connection, version_id: int, keys: Sequence[str]) -> None:
    """Forget that keys changed: no file is to name them."""
    connection.execute(
        text("delete from vectormill.collection_changes where version_id = :version and key = any(:keys)"),
        {"version": version_id, "keys": list(keys)},
    )


def note_shown(connection: Connection, version_id: int, number: int) -> None:
    """Note that readers see this set."""
    connection.execute(
        text("""
            update vectormill.collection_versions set output_shown = :number, output_problem = null
            where id = :version
        """),
        {"version": version_id, "number": number},
    )


def note_problem(connection: Connection, version_id: int, problem: str) -> None:
    """Note why a version's files can't be written."""
    connection.execute(
        text("update vectormill.collection_versions set output_problem = :problem where id = :version"),
        {"version": version_id, "problem": problem},
    )


def compact(connection: Connection, version_id: int) -> None:
    """Let a version's files be written anew as one full set."""
    connection.execute(
        text("update vectormill.collection_versions set compacts = true where id = :version"), {"version": version_id}
    )
