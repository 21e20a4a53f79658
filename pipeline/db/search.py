"""Search: what is nearest to a query, in a job exactly, in a collection by its HNSW index."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from psycopg import sql
from sqlalchemy import Connection, text

from pipeline.core.options import VectorType
from pipeline.db.database import errors_as_sqlalchemys, psycopg_connection
from pipeline.db.embeddings import SPLIT, WHOLE


class NearItem(NamedTuple):
    """Item or passage of a job that a search found."""

    index: int  # type: ignore[assignment] # nobody needs the method of tuples
    key: str | None
    similarity: float
    #: `None`: it isn't kept any more.
    text: str | None
    carried: dict[str, Any] | None
    passage: int
    #: Characters of the item's text; `None`: the whole text.
    start: int | None
    stop: int | None


_IN_JOB = """
    select e.index, e.key, 1 - (coalesce(e.vector, e.half::vector) <=> cast(:query as vector)) as similarity,
           (select case when e.start is null then text else substr(text, e.start + 1, e.stop - e.start) end
            from vectormill.items where job_id = :job and index = e.index),
           (select carried from vectormill.items where job_id = :job and index = e.index),
           e.passage, e.start, e.stop
    from {ROWS} e
    where e.job_id = :job and (:everywhere or (
      select not exists (select from jsonb_each_text(cast(:where as jsonb)) w
                         where (i.carried->>w.key) is distinct from w.value)
      from vectormill.items i where i.job_id = :job and i.index = e.index))
    order by coalesce(e.vector, e.half::vector) <=> cast(:query as vector), e.index, e.passage limit :limit
"""
_IN_JOBS = {False: _IN_JOB.format(ROWS=WHOLE), True: _IN_JOB.format(ROWS=SPLIT)}


def nearest_items(
    connection: Connection,
    job_id: UUID,
    query: Sequence[float],
    limit: int,
    *,
    passages: bool = False,
    where: Mapping[str, str] = {},
) -> list[NearItem]:
    """Return the items of a job that are nearest to `query` by cosine, of one that splits its passages. `where`: only
    items that carry these values, compared as text."""
    rows = connection.execute(
        text(_IN_JOBS[passages]),
        {
            "job": job_id,
            "query": _as_vector(query),
            "limit": limit,
            "where": orjson.dumps(where).decode(),
            "everywhere": not where,
        },
    )
    return [NearItem(*row) for row in rows]


# As the collection's view and index have the vector. Outside, keys settle ties, without keeping the index from its use.
_IN_COLLECTION = """
    select key, 1 - distance as similarity, carried, passage, start, stop
    from (select k.key, k.carried, v.passage, v.start, v.stop, {vector} <=> cast(%(query)s as {kind}) as distance
          from vectormill.collection_vectors v
          join vectormill.collection_keys k on k.version_id = {version} and k.slot = v.slot
          where v.version_id = {version}
            and not exists (select from jsonb_each_text(cast(%(where)s as jsonb)) w
                            where (k.carried->>w.key) is distinct from w.value)
          order by {vector} <=> cast(%(query)s as {kind}) limit %(limit)s) nearest
    order by distance, key, passage
"""
# The index goes on while the filter leaves too few. pgvector knows that from 0.8 on.
_GO_ON = """
    select set_config('hnsw.iterative_scan', 'strict_order', true), set_config('hnsw.ef_search', :candidates, true)
    from pg_extension where extname = 'vector' and string_to_array(extversion, '.')::int[] >= '{0,8}'
"""
_CANDIDATES, _MOST_CANDIDATES = 40, 1_000


class NearKey(NamedTuple):
    """Key or passage that a search found."""

    key: str
    similarity: float
    carried: dict[str, Any] | None
    passage: int
    #: Characters of the text; `None`: the whole text.
    start: int | None
    stop: int | None


def _as_vector(query: Sequence[float]) -> str:
    """Return a vector as Postgres reads it."""
    return "[" + ",".join(repr(float(x)) for x in query) + "]"


def nearest_keys(
    connection: Connection,
    version_id: int,
    query: Sequence[float],
    limit: int,
    *,
    kept_as: VectorType,
    where: Mapping[str, str],
) -> list[NearKey]:
    """Return what is nearest to `query` by cosine among a version's vectors, of keys that carry the values `where`."""
    kind = sql.SQL(kept_as.sql_type)
    statement = sql.SQL(_IN_COLLECTION).format(
        vector=sql.SQL("(v.{}::{}({}))").format(sql.Identifier(kept_as.column), kind, sql.Literal(len(query))),
        kind=kind,
        version=sql.Literal(version_id),
    )
    values = {"query": _as_vector(query), "limit": limit, "where": orjson.dumps(where).decode()}
    connection.execute(text(_GO_ON), {"candidates": str(min(_MOST_CANDIDATES, limit + _CANDIDATES))})
    found = _fetch(connection, statement, values)
    if len(found) < limit:
        # The index gives up after some ten thousand vectors; then all are compared.
        connection.execute(text("set local enable_indexscan = off"))
        found = _fetch(connection, statement, values)
        connection.execute(text("set local enable_indexscan = on"))
    return found


def _fetch(connection: Connection, statement: sql.Composed, values: Mapping[str, Any]) -> list[NearKey]:
    with errors_as_sqlalchemys():
        return [NearKey(*row) for row in psycopg_connection(connection).execute(statement, values)]
