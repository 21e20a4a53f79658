"""Upserts and deletes of vectors by key in the user's own table, in the same Postgres."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from psycopg import sql
from sqlalchemy import Connection, RowMapping, text
from sqlalchemy.exc import DBAPIError

from pipeline.core.errors import UserError
from pipeline.core.options import INTEGER_BITS, PASSAGE_COLUMNS, UserTable
from pipeline.db.database import errors_as_sqlalchemys, plain_reason, psycopg_connection

_TEXTS = ("text", "character varying")
_VECTORS = ("vector", "halfvec")
#: Most dimensions that an HNSW index takes.
HNSW_DIMENSIONS = {"vector": 2_000, "halfvec": 4_000}


def _named(into: UserTable) -> sql.Identifier:
    """Return the table's identifier, for composing SQL."""
    return sql.Identifier(into.schema, into.table)


def check(
    connection: Connection,
    name: str,
    *,
    key_column: str,
    dimensions: int,
    hnsw: bool,
    passages: bool = False,
    deletes: bool = False,
) -> UserTable:
    """Check the table `name` before a job starts that writes into it, or `deletes` keys too, and return its
    description.

    It needs a unique key column of a string, integer or uuid type, and exactly one vector or halfvec column that takes
    `dimensions` elements. With `hnsw`, that column must declare its dimensions. Any other column must be nullable,
    generated or have a default.

    With `passages`, the key column and an integer column `passage` are unique together instead, and integer columns
    `start` and `stop` are filled where there are any.

    Raises:
        UserError: there is no such table, or it can't take the vectors; the message says how to fix it.
    """
    row = _table(connection, name)
    if (passages or deletes) and not row["may_delete"]:
        what = "keys that go" if deletes else "passages that a key has no more"
        raise _refused(name, f"vectormill's role lacks delete on it, to remove {what}; grant it.")
    if hnsw and not row["may_index"]:
        raise _refused(name, "an index needs a plain table that vectormill's role owns; leave hnsw out.")
    columns = {column["name"]: column for column in _columns(connection, row["oid"])}
    key = columns.get(key_column)
    if key is None:
        raise _refused(name, f'no column "{key_column}"; name the key column as it is called there.')
    if key["type"] not in (*_TEXTS, *INTEGER_BITS, "uuid"):
        raise _refused(name, f'the key "{key_column}" is {key["type"]}; it must be text, an integer or uuid.')
    if passages:
        _check_passages(name, columns, key)
    elif not key["is_unique"]:
        raise _refused(name, f'"{key_column}" isn\'t unique; make it the primary key, or give it a unique index.')
    numbers = tuple(column for column in PASSAGE_COLUMNS if passages and column in columns)
    vectors = [column for column in columns.values() if column["type"] in _VECTORS]
    if len(vectors) != 1:
        raise _refused(name, f"it has {len(vectors)} columns of type vector or halfvec; it must have exactly one.")
    (vector,) = vectors
    _check_dimensions(name, vector, dimensions, hnsw)
    for column in columns.values():
        if column["is_needed"] and column["name"] not in (key_column, vector["name"], *numbers):
            raise _refused(name, f'"{column["name"]}" is not null without a default; new rows can\'t be inserted.')
    return UserTable(
        schema=row["schema"],
        table=row["table"],
        key_column=key_column,
        key_type=key["type"],
        vector_column=vector["name"],
        vector_type=vector["type"],
        passage_columns=numbers,
    )


def _check_passages(name: str, columns: Mapping[str, RowMapping], key: RowMapping) -> None:
    """Refuse a table that can't hold several vectors of a key."""
    for column in PASSAGE_COLUMNS:
        if column == key["name"]:
            raise _refused(name, f'the key can\'t be "{column}", which says where a passage is; rename it.')
        if column in columns and (columns[column]["type"] not in ("integer", "bigint") or columns[column]["is_made"]):
            raise _refused(name, f'"{column}" must be a plain integer or bigint, to say where a passage is.')
    if "passage" not in columns:
        raise _refused(name, 'no column "passage"; an integer of that name tells the passages of a key apart.')
    if columns["passage"]["number"] not in key["unique_with"]:
        raise _refused(
            name,
            f'"{key["name"]}" and "passage" aren\'t unique together; make them the primary key, or give them a unique '
            "index.",
        )


def _refused(table: str, message: str) -> UserError:
    return UserError(message, field="into", given=table)


def _table(connection: Connection, name: str) -> RowMapping:
    """Return the table called `name`, which is written as in SQL, with or without a schema."""
    query = text("""
        select c.oid, n.nspname as schema, c.relname as table, c.relkind in ('r', 'p') as is_table,
               has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')
                 and has_table_privilege(c.oid, 'update') as may_write,
               has_table_privilege(c.oid, 'delete') as may_delete,
               c.relkind = 'r' and pg_has_role(c.relowner, 'usage') as may_index
        from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = to_regclass(:name)
    """)
    try:
        row = connection.execute(query, {"name": name}).mappings().one_or_none()
    except DBAPIError as error:
        raise _refused(name, f"{plain_reason(error)}; write it as table or schema.table.") from error
    if row is None:
        raise _refused(name, "no such table in vectormill's database; write it as schema.table.")
    if not row["is_table"]:
        raise _refused(name, "it isn't a table, so vectors can't be inserted into it.")
    if not row["may_write"]:
        raise _refused(name, "vectormill's role lacks select, insert or update on it; grant all three.")
    return row


def _columns(connection: Connection, oid: int) -> Sequence[RowMapping]:
    """Return a table's columns: name, type, declared dimensions, whether it is unique by itself, and whether inserts
    need it."""
    return (
        connection.execute(
            text("""
            select a.attname as name, a.attnum as number, format_type(a.atttypid, null) as type,
                   a.atttypmod as dimensions,
                   a.attnotnull and not a.atthasdef and a.attidentity = '' and a.attgenerated = '' as is_needed,
                   a.attgenerated <> '' or a.attidentity = 'a' as is_made,
                   exists (select from pg_index i where i.indrelid = a.attrelid and i.indisunique and i.indisvalid
                           and i.indpred is null and i.indnkeyatts = 1 and i.indkey[0] = a.attnum) as is_unique,
                   array(select case when i.indkey[0] = a.attnum then i.indkey[1] else i.indkey[0] end
                         from pg_index i where i.indrelid = a.attrelid and i.indisunique and i.indisvalid
                         and i.indpred is null and i.indnkeyatts = 2 and a.attnum in (i.indkey[0], i.indkey[1]))
                     as unique_with
            from pg_attribute a where a.attrelid = :table and a.attnum > 0 and not a.attisdropped
        """),
            {"table": oid},
        )
        .mappings()
        .all()
    )


def _check_dimensions(name: str, vector: RowMapping, dimensions: int, hnsw: bool) -> None:
    declared = vector["dimensions"]
    if declared > 0 and declared != dimensions:
        raise _refused(
            name,
            f'"{vector["name"]}" has {declared:,} dimensions, the job\'s vectors {dimensions:,}; '
            "change the column, or submit with that many dimensions.",
        )
    if hnsw and declared <= 0:
        raise _refused(name, f'for an index, declare "{vector["name"]}" as {vector["type"]}({dimensions}).')
    most = HNSW_DIMENSIONS[vector["type"]]
    if hnsw and dimensions > most:
        raise _refused(name, f"an index takes at most {most:,} dimensions of {vector['type']}; leave hnsw out.")


def upsert(connection: Connection, into: UserTable, job_id: UUID, indexes: Sequence[int] | None) -> None:
    """Upsert the vectors of `indexes`, or `None` for all of the job, into the user's table. If a key occurs twice, the
    higher index wins; across chunks, the last commit wins. Passages that a key had and has no more are deleted."""
    if into.passage_columns:
        _upsert_passages(connection, into, job_id, indexes)
        return
    key = sql.Identifier(into.key_column)
    vector = sql.Identifier(into.vector_column)
    statement = sql.SQL("""
        insert into {table} ({key}, {vector})
        select distinct on (key) cast(key as {key_type}), coalesce(vector::{vector_type}, half::{vector_type})
        from vectormill.embeddings
        where job_id = %(job)s {of_commit} order by key, index desc
        on conflict ({key}) do update set {vector} = excluded.{vector}
    """).format(
        table=_named(into),
        key=key,
        vector=vector,
        key_type=sql.SQL(into.key_type),
        vector_type=sql.SQL(into.vector_type),
        of_commit=_of_commit(indexes),
    )
    with errors_as_sqlalchemys():
        psycopg_connection(connection).execute(statement, {"job": job_id, "indexes": list(indexes or ())})


def _of_commit(indexes: Sequence[int] | None) -> sql.SQL:
    # A condition that served both would cost each commit a read of all rows of the job.
    return sql.SQL("" if indexes is None else "and index = any(%(indexes)s)")


_MADE = """
    with latest as (
      select key, max(index) as index from vectormill.passages
      where job_id = %(job)s {of_commit} group by key
    ), made as (
      select e.* from vectormill.passages e join latest l on l.index = e.index where e.job_id = %(job)s
    )
"""
_UPSERT_PASSAGES = """
    {made}
    insert into {table} ({key}, {numbers}, {vector})
    select cast(key as {key_type}), {numbers}, coalesce(vector::{vector_type}, half::{vector_type}) from made
    order by key, passage
    on conflict ({key}, {passage}) do update set {changes}
"""
# A statement of its own: it sees what another transaction wrote of a key while the first one waited for it.
_DELETE_PASSAGES = """
    {made}
    delete from {table} t using (select key, max(passage) as last from made group by key) m
    where t.{key} = cast(m.key as {key_type}) and t.{passage} > m.last
"""


def _upsert_passages(connection: Connection, into: UserTable, job_id: UUID, indexes: Sequence[int] | None) -> None:
    numbers = [sql.Identifier(column) for column in into.passage_columns]
    vector = sql.Identifier(into.vector_column)
    parts = {
        "made": sql.SQL(_MADE).format(of_commit=_of_commit(indexes)),
        "table": _named(into),
        "key": sql.Identifier(into.key_column),
        "passage": numbers[0],
        "numbers": sql.SQL(", ").join(numbers),
        "vector": vector,
        "changes": sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(each) for each in (*numbers[1:], vector)),
        "key_type": sql.SQL(into.key_type),
        "vector_type": sql.SQL(into.vector_type),
    }
    with errors_as_sqlalchemys():
        driver, values = psycopg_connection(connection), {"job": job_id, "indexes": list(indexes or ())}
        driver.execute(sql.SQL(_UPSERT_PASSAGES).format(**parts), values)
        driver.execute(sql.SQL(_DELETE_PASSAGES).format(**parts), values)


def exists(connection: Connection, name: str) -> bool:
    """Return True if there is a table of this name, written as in SQL."""
    return bool(connection.execute(text("select to_regclass(:name) is not null"), {"name": name}).scalar_one())


def has_rows(connection: Connection, into: UserTable) -> bool:
    """Return True if the table isn't empty."""
    with errors_as_sqlalchemys():
        found = (
            psycopg_connection(connection)
            .execute(sql.SQL("select exists (select from {})").format(_named(into)))
            .fetchone()
        )
    return bool(found and found[0])


def deletion(into: UserTable) -> sql.Composed:
    """Return the statement that deletes the keys of `doomed`, a query beside it."""
    return sql.SQL("delete from {table} t using doomed d where t.{key} = cast(d.key as {key_type})").format(
        table=_named(into), key=sql.Identifier(into.key_column), key_type=sql.SQL(into.key_type)
    )


def build_hnsw(connection: Connection, into: UserTable) -> None:
    """Build an HNSW index for cosine distance, on an autocommit connection, while readers and writers go on.

    An invalid index that an earlier try left behind is rebuilt.

    Raises:
        sqlalchemy.exc.DBAPIError: the table refuses it, or the connection was lost.
    """
    name = f"{into.table[:40]}_{into.vector_column[:12]}_hnsw"
    with errors_as_sqlalchemys():
        driver = psycopg_connection(connection)
        invalid = driver.execute(
            "select 1 from pg_index where indexrelid = to_regclass(%s) and not indisvalid",
            (f"{_quoted(into.schema)}.{_quoted(name)}",),
        ).fetchone()
        if invalid:
            driver.execute(sql.SQL("drop index concurrently {}").format(sql.Identifier(into.schema, name)))
        driver.execute(
            sql.SQL("create index concurrently if not exists {} on {} using hnsw ({} {})").format(
                sql.Identifier(name),
                _named(into),
                sql.Identifier(into.vector_column),
                sql.Identifier(f"{into.vector_type}_cosine_ops"),
            )
        )


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string()
