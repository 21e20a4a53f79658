"""Collections: rows, tables and views."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from sqlalchemy import Connection, RowMapping, text

from pipeline.core.collections import VersionState
from pipeline.core.errors import UnknownCollection

#: Longest wait for readers and writers before a collection is dropped; those of other collections wait meanwhile.
_LOCK_SECONDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Collection, with one of its versions."""

    id: int
    workspace_id: int
    name: str
    #: Name of the view in the schema `vectormill`.
    view: str
    expect_every: timedelta | None
    created_at: datetime
    version_id: int
    state: VersionState
    #: Of a previous version: the end of the time in which readers may go back to it.
    kept_until: datetime | None
    #: Name of the model.
    model: str
    vector_space_id: int
    dimensions: int
    #: As `JobOptions` writes them.
    options: Mapping[str, Any]
    #: Folder or URI of its Parquet files; `None`: it has none.
    output: str | None


def relation_exists(connection: Connection, name: str) -> bool:
    """Return True if the schema has a table, view or sequence of this name."""
    known = text("""
        select exists (select from pg_class where relnamespace = 'vectormill'::regnamespace and relname = :name)
    """)
    return bool(connection.execute(known, {"name": name}).scalar_one())


def create(
    connection: Connection,
    workspace_id: int,
    *,
    name: str,
    view: str,
    expect_every: timedelta | None,
    model: str,
    vector_space_id: int,
    options: Mapping[str, Any],
    output: str | None = None,
) -> bool:
    """Create a collection with its tables and view. Return False if its name or that of the view is taken."""
    values = {
        "workspace": workspace_id,
        "name": name,
        "view": view,
        "expect": expect_every,
    }
    made = connection.execute(
        text("""
            insert into vectormill.collections (workspace_id, name, view, expect_every)
            values (:workspace, :name, :view, :expect) on conflict do nothing returning id
        """),
        values,
    ).scalar_one_or_none()
    if made is None:
        return False
    add_version(
        connection,
        made,
        model=model,
        vector_space_id=vector_space_id,
        options=options,
        output=output,
        state=VersionState.CURRENT,
    )
    connection.execute(text("select vectormill.show_collection(:collection)"), {"collection": made})
    return True


def add_version(
    connection: Connection,
    collection_id: int,
    *,
    model: str,
    vector_space_id: int,
    options: Mapping[str, Any],
    state: VersionState,
    output: str | None = None,
) -> None:
    """Add a version to a collection, with its tables."""
    version = connection.execute(
        text("""
            insert into vectormill.collection_versions
              (collection_id, model_name, vector_space_id, options, output, state)
            values (:collection, :model, :space, cast(:options as jsonb), :output, :state) returning id
        """),
        {
            "collection": collection_id,
            "model": model,
            "space": vector_space_id,
            "options": orjson.dumps(options).decode(),
            "output": output,
            "state": state,
        },
    ).scalar_one()
    connection.execute(text("select vectormill.make_collection_tables(:version)"), {"version": version})


_READ = """
    select c.id, c.workspace_id, c.name, c.view, c.expect_every, c.created_at, v.id as version_id, v.state,
           v.kept_until, v.model_name as model, v.vector_space_id, s.dimensions, v.options, v.output
    from vectormill.collections c
    join vectormill.collection_versions v on v.collection_id = c.id
    join vectormill.vector_spaces s on s.id = v.vector_space_id
"""
_READ_CURRENT = _READ + " where v.state = 'current'"


def _as_collection(row: RowMapping) -> Collection:
    return Collection(**{**row, "state": VersionState(row["state"])})


def by_name(connection: Connection, workspace_id: int, name: str) -> Collection | None:
    """Return a workspace's collection with its current version; None if there is none."""
    query = text(_READ_CURRENT + " and c.workspace_id = :workspace and c.name = :name")
    row = connection.execute(query, {"workspace": workspace_id, "name": name}).mappings().one_or_none()
    return _as_collection(row) if row else None


def by_id(connection: Connection, collection_id: int) -> Collection | None:
    """Return a collection with its current version; None if there is none."""
    row = connection.execute(text(_READ_CURRENT + " and c.id = :id"), {"id": collection_id}).mappings().one_or_none()
    return _as_collection(row) if row else None


def of_version(connection: Connection, version_id: int) -> Collection | None:
    """Return a collection with the version of this id; None if there is none."""
    row = connection.execute(text(_READ + " where v.id = :id"), {"id": version_id}).mappings().one_or_none()
    return _as_collection(row) if row else None


def versions(connection: Connection, collection_id: int) -> dict[VersionState, Collection]:
    """Return a collection with each version that isn't gone, the current one first."""
    query = text(_READ + " where c.id = :id and v.state <> 'gone' order by v.state")
    rows = connection.execute(query, {"id": collection_id}).mappings()
    return {found.state: found for found in map(_as_collection, rows)}


def lock_places(connection: Connection) -> None:
    """Let no other collection take a table or a folder of the user before the transaction ends."""
    connection.execute(text("select pg_advisory_xact_lock(hashtextextended('vectormill collections into', 0))"))


def writing_to(connection: Connection, table: str) -> str | None:
    """Return the name of a collection of any workspace that writes to this table of the user; None if none does."""
    found = text("""
        select c.name from vectormill.collection_versions v join vectormill.collections c on c.id = v.collection_id
        where to_regclass(v.options->>'into') = to_regclass(:table) limit 1
    """)
    name: str | None = connection.execute(found, {"table": table}).scalar_one_or_none()
    return name


def keeping_files_in(connection: Connection, folder: str) -> str | None:
    """Return the name of a collection of any workspace that keeps files in this folder, also of a version that goes;
    None if none does."""
    found = text("""
        select c.name from vectormill.collection_versions v join vectormill.collections c on c.id = v.collection_id
        where rtrim(v.output, '/') = rtrim(:folder, '/') limit 1
    """)
    name: str | None = connection.execute(found, {"folder": folder}).scalar_one_or_none()
    return name


def workspace_of(connection: Connection, collection_id: int) -> str:
    """Return the name of a collection's workspace."""
    found = text("""
        select w.name from vectormill.collections c join vectormill.workspaces w on w.id = c.workspace_id
        where c.id = :id
    """)
    return str(connection.execute(found, {"id": collection_id}).scalar_one())


def count(connection: Connection, workspace_id: int) -> int:
    """Return the number of a workspace's collections."""
    found = text("select count(*) from vectormill.collections where workspace_id = :workspace")
    return int(connection.execute(found, {"workspace": workspace_id}).scalar_one())


def of_workspace(connection: Connection, workspace_id: int | None) -> list[Collection]:
    """Return the collections of a workspace, or of all, with their current versions, by name."""
    query = text(
        _READ_CURRENT
        + " and (c.workspace_id = :workspace or cast(:workspace as bigint) is null) order by c.name, c.workspace_id"
    )
    return [_as_collection(row) for row in connection.execute(query, {"workspace": workspace_id}).mappings()]


#: Keys up to which they are counted one by one.
_COUNTED_KEYS = 100_000


def about_keys(connection: Connection, version_id: int) -> int:
    """Return the number of a version's keys; of more than 100,000, the planner's estimate."""
    row = connection.execute(
        text("""
            select (select count(*) from (select from vectormill.collection_keys
                                          where version_id = :version limit :counted + 1) k) as counted,
                   (select reltuples::bigint from pg_class
                    where oid = to_regclass('vectormill.collection_keys_' || :version)) as estimate
        """),
        {"version": version_id, "counted": _COUNTED_KEYS},
    ).one()
    return int(row.counted) if row.counted <= _COUNTED_KEYS else max(int(row.counted), int(row.estimate or 0))


def exists(connection: Connection, version_id: int) -> bool:
    """Return True if a version hasn't been dropped, and isn't going to be."""
    found = text("""
        select exists (select from vectormill.collection_versions where id = :version and state <> 'gone')
    """)
    return bool(connection.execute(found, {"version": version_id}).scalar_one())


def has_index(connection: Connection, version_id: int) -> bool:
    """Return True if a version's vectors have their HNSW index."""
    return relation_exists(connection, f"collection_vectors_{version_id}_hnsw")


def lacks_index(connection: Connection, version_id: int) -> bool:
    """Return True if a version has vectors, and no HNSW index of them. One of an empty table would slow down the
    transaction that shows a first atomic sync."""
    if has_index(connection, version_id) or not relation_exists(connection, f"collection_vectors_{version_id}"):
        return False
    query = text("select exists (select from vectormill.collection_vectors where version_id = :version)")
    return bool(connection.execute(query, {"version": version_id}).scalar_one())


def build_index(connection: Connection, version_id: int) -> None:
    """Build the HNSW index of a version's vectors if there is none. Readers go on; writers wait."""
    connection.execute(text("select vectormill.index_collection(:version)"), {"version": version_id})


def lock(connection: Connection, collection_id: int) -> None:
    """Let no sync of a collection begin before the transaction ends."""
    connection.execute(text("select set_config('lock_timeout', :limit, true)"), {"limit": f"{_LOCK_SECONDS}s"})
    connection.execute(text("select id from vectormill.collections where id = :id for update"), {"id": collection_id})


def drop(connection: Connection, collection_id: int) -> None:
    """Drop a collection, which the caller has locked, with its view, keys, vectors and history.

    Raises:
        sqlalchemy.exc.DBAPIError: something depends on the view, or others use a collection for two seconds.
    """
    for statement in (*_FORGET_STAGED, _FORGET_CHANGES):
        connection.execute(text(statement), {"collection": collection_id})
    connection.execute(text("select vectormill.drop_collection(:collection)"), {"collection": collection_id})


_FORGET = """
    delete from vectormill.{TABLE}
    where job_id in (select job_id from vectormill.syncs where collection_id = :collection)
"""
_FORGET_STAGED = [_FORGET.format(TABLE=table) for table in ("sync_seen", "sync_changes")]
_FORGET_CHANGES = """
    delete from vectormill.collection_changes
    where version_id in (select id from vectormill.collection_versions where collection_id = :collection)
"""


def begin_sync(
    connection: Connection, job_id: UUID, collection: Collection, *, whole: bool, beside: UUID | None
) -> int:
    """Record a sync of a collection's version, which can't be dropped meanwhile. Return the highest slot so far.

    Raises:
        UnknownCollection: it has been dropped, or the version is gone.
    """
    kept = text("""
        select id from vectormill.collections c
        where id = :id
          and exists (select from vectormill.collection_versions v where v.id = :version and v.state <> 'gone')
        for key share
    """)
    if connection.execute(kept, {"id": collection.id, "version": collection.version_id}).first() is None:
        raise UnknownCollection(f'no collection "{collection.name}" of model {collection.model}: it has been dropped.')
    slot: int = connection.execute(
        text("""
            insert into vectormill.syncs (job_id, collection_id, version_id, is_whole, beside, last_slot)
            values (:job, :collection, :version, :whole, :beside, nextval('vectormill.collection_slots'))
            returning last_slot
        """),
        {
            "job": job_id,
            "collection": collection.id,
            "version": collection.version_id,
            "whole": whole,
            "beside": beside,
        },
    ).scalar_one()
    return slot


def history(connection: Connection, collection_id: int, limit: int) -> list[RowMapping]:
    """Return a collection's newest syncs, newest first. The state of one whose job is purged is None."""
    rows = connection.execute(
        text("""
            select s.job_id, j.state, coalesce(v.model_name, j.model_name) as model, s.beside is not null as beside,
                   not s.is_whole as delta, s.added, s.changed, s.unchanged, s.removed,
                   coalesce((coalesce(j.receipt, j.progress)->'items'->>'rejected')::bigint, 0) as rejected,
                   s.tokens_saved + coalesce((j.receipt->'tokens'->>'reused')::bigint, 0) as tokens_saved,
                   s.created_at, j.finished_at,
                   extract(epoch from coalesce(j.finished_at, s.settled_at, now()) - s.created_at)::float8 as seconds
            from vectormill.syncs s
            left join vectormill.jobs j on j.id = s.job_id
            left join vectormill.collection_versions v on v.id = s.version_id
            where s.collection_id = :collection order by s.created_at desc limit :limit
        """),
        {"collection": collection_id, "limit": limit},
    )
    return list(rows.mappings())


class Expected(NamedTuple):
    """Collection whose syncs are expected from time to time."""

    view: str
    #: By the planner's counts; 0 while there are none.
    keys: int
    #: Time since its last sync, or its creation, beyond the one in which a sync is expected; 0: in time.
    overdue_seconds: float


def expected(connection: Connection, limit: int) -> list[Expected]:
    """Return the collections whose syncs are expected from time to time, the oldest ones first."""
    rows = connection.execute(
        text("""
            select c.view, greatest(0, coalesce(k.reltuples, 0))::bigint,
                   greatest(0, extract(epoch from now() - c.expect_every - coalesce(
                     (select max(s.settled_at) from vectormill.syncs s where s.version_id = v.id), c.created_at
                   )))::float8
            from vectormill.collections c
            join vectormill.collection_versions v on v.collection_id = c.id and v.state = 'current'
            left join pg_class k on k.oid = to_regclass('vectormill.collection_keys_' || v.id)
            where c.expect_every is not null order by c.id limit :limit
        """),
        {"limit": limit},
    )
    return [Expected(*row) for row in rows]


def last_synced(connection: Connection, version_id: int) -> datetime | None:
    """Return the time at which the last whole or partial sync of a version was completed."""
    found = text("select max(settled_at) from vectormill.syncs where version_id = :version")
    moment: datetime | None = connection.execute(found, {"version": version_id}).scalar_one()
    return moment
