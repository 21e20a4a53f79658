"""Forgotten keys: requests, the keys that are still to be erased, and tombstones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.tombstones import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Request to forget keys of a workspace, or of one of its collections."""

    id: UUID
    workspace_id: int
    collection_id: int | None
    requested_by: str
    keys: int
    #: Items of jobs, and keys of collections' versions, that were erased so far.
    items: int
    collected: int
    #: Jobs up to this one are looked through, but for those that hadn't ended, so that they may still write.
    after_job: UUID | None
    waits_for: Sequence[UUID]
    #: Why a table of the user or a storage can't be changed; `None`: there is no such.
    problem: str | None
    #: Places of jobs' files that can't be found.
    unseen: Sequence[str]
    created_at: datetime
    finished_at: datetime | None


def tombstone_key(connection: Connection, workspace_id: int) -> bytes:
    """Return the secret with which a workspace's tombstones are hashed."""
    found = text("select tombstone_key from vectormill.workspaces where id = :workspace")
    return bytes(connection.execute(found, {"workspace": workspace_id}).scalar_one())


def add(connection: Connection, forget_id: UUID, workspace_id: int, collection_id: int | None, by: str) -> None:
    """Add a request without keys. Another one of the workspace waits until the transaction ends, since both might have
    the same keys in another order."""
    connection.execute(
        text("select pg_advisory_xact_lock(hashtextextended('vectormill forget ' || :workspace, 0))"),
        {"workspace": str(workspace_id)},
    )
    connection.execute(
        text("""
            insert into vectormill.forgets (id, workspace_id, collection_id, requested_by)
            values (:id, :workspace, :collection, :by)
        """),
        {"id": forget_id, "workspace": workspace_id, "collection": collection_id, "by": by},
    )


def add_keys(connection: Connection, forget_id: UUID, keys: Sequence[str], digests: Sequence[bytes]) -> None:
    """Add keys to a request, with their tombstones. Keys that it has already are passed over."""
    connection.execute(
        text("""
            with added as (
              insert into vectormill.forget_keys (forget_id, key) select :id, unnest(cast(:keys as text[]))
              on conflict do nothing returning key
            ), buried as (
              insert into vectormill.tombstones (workspace_id, digest, forgotten_by)
              select f.workspace_id, given.digest, f.requested_by
              from vectormill.forgets f, unnest(cast(:digests as bytea[])) given(digest)
              where f.id = :id on conflict do nothing
            )
            update vectormill.forgets set keys = keys + (select count(*) from added) where id = :id
        """),
        {"id": forget_id, "keys": list(keys), "digests": list(digests)},
    )


def begin(connection: Connection, forget_id: UUID) -> None:
    """Let a request begin with the end of its transaction: jobs that are created later see its tombstones."""
    connection.execute(
        text("update vectormill.forgets set created_at = clock_timestamp() where id = :id"), {"id": forget_id}
    )


def keep(connection: Connection, workspace_id: int, collection_id: int | None, keys: Sequence[str]) -> None:
    """Take keys out of the requests of this scope that aren't finished."""
    connection.execute(
        text("""
            delete from vectormill.forget_keys k using vectormill.forgets f
            where f.workspace_id = :workspace and f.collection_id is not distinct from :collection
              and f.finished_at is null and k.forget_id = f.id and k.key = any(:keys)
        """),
        {"workspace": workspace_id, "collection": collection_id, "keys": list(keys)},
    )


def lift(connection: Connection, workspace_id: int, digests: Sequence[bytes]) -> int:
    """Delete tombstones. Return their number."""
    return connection.execute(
        text("delete from vectormill.tombstones where workspace_id = :workspace and digest = any(:digests)"),
        {"workspace": workspace_id, "digests": list(digests)},
    ).rowcount


def has_tombstones(connection: Connection, workspace_id: int) -> bool:
    """Return True if a workspace has forgotten a key."""
    found = text("select exists (select from vectormill.tombstones where workspace_id = :workspace)")
    return bool(connection.execute(found, {"workspace": workspace_id}).scalar_one())


def buried(connection: Connection, workspace_id: int, digests: Iterable[bytes]) -> set[bytes]:
    """Return those of some digests that have a tombstone."""
    found = text("""
        select t.digest from unnest(cast(:digests as bytea[])) given(digest)
        cross join lateral (select digest from vectormill.tombstones t
                            where t.workspace_id = :workspace and t.digest = given.digest offset 0) t
    """)
    rows = connection.execute(found, {"workspace": workspace_id, "digests": list(digests)})
    return {bytes(row[0]) for row in rows}


def forgotten_places(
    connection: Connection, workspace_id: int, keys: Sequence[str | None], collection_id: int | None = None
) -> list[int]:
    """Return the positions of keys that a workspace, or one of its collections, has forgotten."""
    if not has_tombstones(connection, workspace_id):
        return []
    secret, places = tombstone_key(connection, workspace_id), dict[bytes, list[int]]()
    for scope in {None, collection_id}:
        for at, key in enumerate(keys):
            if key is not None:
                places.setdefault(digest(secret, key, scope), []).append(at)
    return sorted({at for found in buried(connection, workspace_id, places) for at in places[found]})


_READ = """
    select id, workspace_id, collection_id, requested_by, keys, items, collected, after_job, waits_for, problem,
           unseen, created_at, finished_at
    from vectormill.forgets
"""


def by_id(connection: Connection, forget_id: UUID) -> Forget | None:
    """Return a request; None if there is none."""
    row = connection.execute(text(_READ + " where id = :id"), {"id": forget_id}).mappings().one_or_none()
    return Forget(**row) if row else None


def unfinished(connection: Connection, limit: int) -> Sequence[UUID]:
    """Return the requests that aren't finished, the oldest first."""
    found = text("select id from vectormill.forgets where finished_at is null order by id limit :limit")
    return list(connection.execute(found, {"limit": limit}).scalars())


def with_problems(connection: Connection, workspace_id: int | None, limit: int) -> list[Forget]:
    """Return the oldest unfinished requests of a workspace, or of all, that something stands in the way of."""
    found = text(
        _READ
        + """
        where finished_at is null and problem is not null
          and (workspace_id = :workspace or cast(:workspace as bigint) is null) order by id limit :limit
    """
    )
    rows = connection.execute(found, {"workspace": workspace_id, "limit": limit})
    return [Forget(**row) for row in rows.mappings()]


def of_workspace(connection: Connection, workspace_id: int) -> UUID | None:
    """Return a request of this workspace that isn't finished; None if there is none."""
    found = text("""
        select id from vectormill.forgets where workspace_id = :workspace and finished_at is null limit 1
    """)
    forget: UUID | None = connection.execute(found, {"workspace": workspace_id}).scalar_one_or_none()
    return forget


def of_collection(connection: Connection, collection_id: int) -> UUID | None:
    """Return a request for keys of this collection that isn't finished; None if there is none."""
    found = text("""
        select id from vectormill.forgets where collection_id = :collection and finished_at is null limit 1
    """)
    forget: UUID | None = connection.execute(found, {"collection": collection_id}).scalar_one_or_none()
    return forget


def keys_after(connection: Connection, forget_id: UUID, key: str | None, limit: int) -> list[str]:
    """Return the next keys of a request after `key`, in order; None: the first ones."""
    found = text("""
        select key from vectormill.forget_keys
        where forget_id = :id and (key > :key or cast(:key as text) is null) order by key limit :limit
    """)
    return list(connection.execute(found, {"id": forget_id, "key": key, "limit": limit}).scalars())


def versions(connection: Connection, forget: Forget) -> Sequence[int]:
    """Return the versions of collections that a request concerns."""
    found = text("""
        select v.id from vectormill.collection_versions v join vectormill.collections c on c.id = v.collection_id
        where c.workspace_id = :workspace and (c.id = :collection or cast(:collection as bigint) is null)
        order by v.id
    """)
    values = {"workspace": forget.workspace_id, "collection": forget.collection_id}
    return list(connection.execute(found, values).scalars())


def jobs_after(connection: Connection, forget: Forget, job_id: UUID | None, limit: int) -> Sequence[UUID]:
    """Return the next jobs that a request concerns after a job, in order.

    Jobs that were created after the request found its tombstones; a minute lets clocks differ.
    """
    rows = connection.execute(
        text("""
            select j.id from vectormill.jobs j
            where j.workspace_id = :workspace and j.created_at < cast(:created as timestamptz) + interval '1 minute'
              and (j.id > :after or cast(:after as uuid) is null)
              and (cast(:collection as bigint) is null
                   or exists (select from vectormill.syncs s
                              where s.job_id = j.id and s.collection_id = :collection))
            order by j.id limit :limit
        """),
        {
            "workspace": forget.workspace_id,
            "created": forget.created_at,
            "after": job_id,
            "collection": forget.collection_id,
            "limit": limit,
        },
    )
    return list(rows.scalars())


_NAMED = """
    select index from vectormill.items i
    where job_id = :job and index >= :first and index < :end
      and key in (select key from vectormill.forget_keys where forget_id = :id)
    union select index from vectormill.{ROWS} e
    where job_id = :job and index >= :first and index < :end
      and key in (select key from vectormill.forget_keys where forget_id = :id)
    union select index from vectormill.rejects r
    where job_id = :job and index >= :first and index < :end
      and key in (select key from vectormill.forget_keys where forget_id = :id)
"""
_ERASE = """
    with items_gone as (
      delete from vectormill.items where job_id = :job and index = any(:indexes)
    ), vectors_gone as (
      delete from vectormill.{ROWS} where job_id = :job and index = any(:indexes) returning index, {START} as start
    ), rejects_gone as (
      delete from vectormill.rejects where job_id = :job and index = any(:indexes) returning index
    ), counted as (
      select c.id, count(*) as items, coalesce(sum(v.items), 0) as vectors, coalesce(sum(v.passages), 0) as passages,
             count(r.index) as rejects
      from unnest(cast(:indexes as bigint[])) given(index)
      cross join lateral (select id from vectormill.chunks where job_id = :job and first_index <= given.index
                          order by first_index desc limit 1) c
      left join (select index, 1 as items, count(start) as passages from vectors_gone group by index) v
        on v.index = given.index
      left join rejects_gone r on r.index = given.index
      group by c.id
    )
    update vectormill.chunks c
    set forgotten = c.forgotten + n.items, forgotten_vectors = c.forgotten_vectors + n.vectors,
        forgotten_passages = c.forgotten_passages + n.passages,
        forgotten_rejects = c.forgotten_rejects + n.rejects,
        most_truncated = (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(c.most_truncated) e
                          where (e->>'index')::bigint <> all(:indexes))
    from counted n where c.id = n.id
"""
#: Its progress has the keys of truncated items. The rows of texts are only passed over while a worker takes them over:
#: without its vector, none is of use.
_ERASE_BESIDE = (
    "update vectormill.jobs set progress = null where id = :job",
    """
    delete from vectormill.known_texts
    where ctid = any(array(select ctid from vectormill.known_texts
                           where job_id = :job and index = any(:indexes) for update skip locked))
    """,
)
_START = {"embeddings": "null::int", "passages": "start"}
_NAMED_OF = {rows: _NAMED.format(ROWS=rows) for rows in _START}
_ERASE_OF = {rows: _ERASE.format(ROWS=rows, START=start) for rows, start in _START.items()}


def erase(connection: Connection, forget: Forget, job_id: UUID, first: int, count: int, *, passages: bool) -> int:
    """Erase a request's keys from a range of an ended job's items: texts, vectors, rejects and carried columns. Return
    the number of items. `passages`: the job splits."""
    rows = "passages" if passages else "embeddings"
    values = {"id": forget.id, "job": job_id, "first": first, "end": first + count}
    indexes = list(connection.execute(text(_NAMED_OF[rows]), values).scalars())
    if indexes:
        for statement in (_ERASE_OF[rows], *_ERASE_BESIDE):
            connection.execute(text(statement), {"job": job_id, "indexes": indexes})
        note_items(connection, forget.id, len(indexes))
    return len(indexes)


def note_items(connection: Connection, forget_id: UUID, items: int) -> None:
    """Count items that were erased from jobs."""
    connection.execute(
        text("update vectormill.forgets set items = items + :items where id = :id"), {"id": forget_id, "items": items}
    )


def note_collected(connection: Connection, forget_id: UUID, keys: int) -> None:
    """Count keys that were erased from a version of a collection."""
    connection.execute(
        text("update vectormill.forgets set collected = collected + :keys where id = :id"),
        {"id": forget_id, "keys": keys},
    )


def advance(connection: Connection, forget_id: UUID, after_job: UUID | None, waits_for: Sequence[UUID]) -> None:
    """Note how far a request is."""
    connection.execute(
        text("update vectormill.forgets set after_job = :after, waits_for = :waits where id = :id"),
        {"id": forget_id, "after": after_job, "waits": list(waits_for)},
    )


def note_problem(connection: Connection, forget_id: UUID, problem: str | None) -> None:
    """Note why a request can't be finished."""
    connection.execute(
        text("update vectormill.forgets set problem = :problem where id = :id"), {"id": forget_id, "problem": problem}
    )


def delete_keys(connection: Connection, forget_id: UUID, limit: int) -> int:
    """Delete some keys of a request. Return their number."""
    return connection.execute(
        text("""
            delete from vectormill.forget_keys where forget_id = :id and key in (
              select key from vectormill.forget_keys where forget_id = :id order by key limit :limit)
        """),
        {"id": forget_id, "limit": limit},
    ).rowcount


def note_unseen(connection: Connection, forget_id: UUID, place: str) -> None:
    """Note a place of files that can't be found."""
    connection.execute(
        text("""
            update vectormill.forgets set unseen = unseen || cast(:place as text)
            where id = :id and :place <> all(unseen)
        """),
        {"id": forget_id, "place": place},
    )


def finish(connection: Connection, forget_id: UUID) -> None:
    """Finish a request."""
    connection.execute(
        text("update vectormill.forgets set finished_at = clock_timestamp(), problem = null where id = :id"),
        {"id": forget_id},
    )


def tables_of_jobs(connection: Connection, workspace_id: int, limit: int) -> list[str]:
    """Return the tables of the user to which a workspace's jobs, but for syncs, have written."""
    rows = connection.execute(
        text("""
            select distinct concat(options->'into'->>'schema', '.', options->'into'->>'table') as name
            from vectormill.jobs
            where workspace_id = :workspace and jsonb_typeof(options->'into') = 'object' and version_id is null
            order by 1 limit :limit
        """),
        {"workspace": workspace_id, "limit": limit},
    )
    return list(rows.scalars())
