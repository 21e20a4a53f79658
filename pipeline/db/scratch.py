"""Scratch copies of the tables of items and embeddings, on which a dry run measures what rows cost.

They live in a transaction that is rolled back, so nobody else sees them, and nothing stays behind whatever dies. While
it lasts, up to half a minute, partitions of both tables can't be added or dropped: who tries waits, or tries again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Connection, Engine, text
from uuid_utils.compat import uuid7

from pipeline.core.chunks import Item
from pipeline.core.errors import UserError
from pipeline.db.database import psycopg_connection
from pipeline.db.tables import SCHEMA

#: Id of the job to which the scratch rows belong.
JOB_ID = uuid7()


@dataclass(frozen=True, slots=True)
class Scratch:
    """Scratch tables of one transaction."""

    connection: Connection
    items: sql.Identifier
    #: Of the table `embeddings`, or `passages`.
    vectors: sql.Identifier
    #: True if rows are written to the WAL; not so where the login may make temporary tables only.
    logged: bool


@contextmanager
def scratch_tables(engine: Engine, *, passages: bool = False) -> Iterator[Scratch]:
    """Create empty copies of the tables of items and of vectors, or with `passages` of passages, with their columns,
    indexes and storage, and drop them at the end.

    A login that may create no tables in the schema gets temporary ones.

    Raises:
        UserError: it may create neither.
    """
    with engine.connect() as connection, connection.begin() as transaction:
        try:
            yield _created(connection, "passages" if passages else "embeddings")
        finally:
            transaction.rollback()


def _created(connection: Connection, vectors: str) -> Scratch:
    try:
        with connection.begin_nested():
            return _create(connection, vectors, logged=True)
    except InsufficientPrivilege:
        pass
    try:
        return _create(connection, vectors, logged=False)
    except InsufficientPrivilege as error:
        raise UserError(
            "the database's login may make no temporary tables, on which a dry run measures; grant it temporary on the "
            "database."
        ) from error


def _create(connection: Connection, vectors: str, *, logged: bool) -> Scratch:
    def copy_of(table: str) -> sql.Identifier:
        name = sql.Identifier(SCHEMA if logged else "pg_temp", f"dry_run_{table}_{uuid4().hex}")
        statement = sql.SQL("create table {} (like {} including all)").format(name, sql.Identifier(SCHEMA, table))
        psycopg_connection(connection).execute(statement)
        return name

    return Scratch(connection, items=copy_of("items"), vectors=copy_of(vectors), logged=logged)


def read(scratch: Scratch, first_index: int, count: int, *, carried: bool) -> list[Item]:
    """Return the items of a range that have a text, as `items.read` does."""
    statement = sql.SQL("""
        select index, key, text, case when %(carried)s then carried::text end, title from {}
        where job_id = %(job)s and index >= %(first)s and index < %(end)s and text is not null order by index
    """).format(scratch.items)
    values = {"carried": carried, "job": JOB_ID, "first": first_index, "end": first_index + count}
    rows = psycopg_connection(scratch.connection).execute(statement, values)
    return [
        Item(index=index, key=key, text=body, carried=(more or "").encode(), title=title or "")
        for index, key, body, more, title in rows
    ]


def disk_bytes(scratch: Scratch, table: sql.Identifier) -> int:
    """Return the size of a scratch table on disk, with its index and the parts of long rows."""
    size = text("select pg_total_relation_size(cast(:name as regclass))")
    return int(scratch.connection.execute(size, {"name": table.as_string(None)}).scalar_one())


def wal_bytes(connection: Connection) -> int:
    """Return the position in the WAL, in bytes, up to which all sessions together have written."""
    return int(connection.execute(text("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")).scalar_one())
