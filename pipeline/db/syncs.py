"""Syncs: the rows that they stage, what commits publish, and what their end removes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, LiteralString
from uuid import UUID

from psycopg import sql
from sqlalchemy import Connection, text

from pipeline.core.chunks import RejectCode
from pipeline.core.collections import OnDuplicateKey, SyncCounts
from pipeline.core.options import UserTable
from pipeline.db import user_table
from pipeline.db.database import errors_as_sqlalchemys, psycopg_connection

#: Slots of a page of `sync_seen`. Its bits are small enough to stay in the row.
PAGE_SLOTS = 8_192


def save_seen(connection: Connection, job_id: UUID, pages: Mapping[int, bytes]) -> None:
    """Save the slots that a whole sync has named: the bits of each page, the lowest first."""
    connection.execute(
        text("""
            insert into vectormill.sync_seen (job_id, page, bits)
            select :job, given.page, given.bits
            from unnest(cast(:pages as bigint[]), cast(:bits as bytea[])) given(page, bits)
        """),
        {"job": job_id, "pages": list(pages), "bits": list(pages.values())},
    )


def save_columns(
    connection: Connection, job_id: UUID, slots: Sequence[int], identities: Sequence[bytes], carried: Sequence[bytes]
) -> None:
    """Save new carried columns of keys whose text is the same, for the sync's end."""
    connection.execute(
        text("""
            insert into vectormill.sync_changes (job_id, slot, identity, carried)
            select :job, given.slot, given.identity, given.carried::jsonb
            from unnest(cast(:slots as bigint[]), cast(:identities as bytea[]), cast(:carried as text[]))
              given(slot, identity, carried)
        """),
        {
            "job": job_id,
            "slots": list(slots),
            "identities": list(identities),
            "carried": [each.decode() for each in carried],
        },
    )


def drop_columns(connection: Connection, job_id: UUID, slots: Sequence[int]) -> int:
    """Drop saved columns of keys that a later row settles. Return their number."""
    return connection.execute(
        text("delete from vectormill.sync_changes where job_id = :job and slot = any(:slots)"),
        {"job": job_id, "slots": list(slots)},
    ).rowcount


_PLACED_OF = """
    select index, key, goes, place > 1
    from (select index, key, identity = '' as goes,
                 row_number() over (partition by key order by index {ORDER}) as place
          from vectormill.items where job_id = %s and key is not null) p
    where goes or place > 1
"""
_PLACED = {
    policy: _PLACED_OF.format(ORDER="desc" if policy is OnDuplicateKey.LAST else "") for policy in OnDuplicateKey
}
_REMOVE_KEYS = """
    insert into vectormill.sync_changes (job_id, slot)
    select :job, k.slot from unnest(cast(:keys as text[])) given(key)
    cross join lateral (select slot from vectormill.collection_keys k
                        where k.version_id = :version and k.key = given.key offset 0) k
    on conflict (job_id, slot) do update set identity = null, carried = null
"""
# Each index looks its chunk up, instead of each chunk all of them.
_VACATE = """
    with gone as (
      delete from vectormill.items where job_id = :job and index = any(:indexes)
    ), unsaid as (
      delete from vectormill.rejects where job_id = :job and index = any(:indexes) returning index
    ), counted as (
      select c.id, count(*) as vacant, count(u.index) as unsaid
      from unnest(cast(:indexes as bigint[])) d(index)
      cross join lateral (select id from vectormill.chunks where job_id = :job and first_index <= d.index
                          order by first_index desc limit 1) c
      left join unsaid u on u.index = d.index
      group by c.id
    )
    update vectormill.chunks c
    set vacant = c.vacant + n.vacant, rejected = c.rejected - n.unsaid,
        state = case when c.items = c.vacant + n.vacant + c.rejected - n.unsaid then 'done' else 'pending' end
    from counted n where c.id = n.id
"""
_REJECT = """
    with doomed as (
      delete from vectormill.items where job_id = :job and index = any(:indexes) and identity <> ''
      returning index, key
    ), kept as (
      insert into vectormill.items (job_id, index, key) select :job, index, key from doomed
    ), said as (
      insert into vectormill.rejects (job_id, index, key, code, message)
      select :job, index, key, :code, :message from doomed
    ), counted as (
      select c.id, count(*) as rejected
      from doomed d
      cross join lateral (select id from vectormill.chunks where job_id = :job and first_index <= d.index
                          order by first_index desc limit 1) c
      group by c.id
    )
    update vectormill.chunks c
    set rejected = c.rejected + n.rejected,
        state = case when c.items = c.vacant + c.rejected + n.rejected then 'done' else c.state end
    from counted n where c.id = n.id
"""
#: Rows that are settled at once.
_PAGE = 10_000


def settle_keys(connection: Connection, job_id: UUID, version_id: int, policy: OnDuplicateKey) -> int:
    """Settle the staged rows of a sync before it is queued: one row a key counts, and keys that go leave no item.
    Return the number of rows that another one replaces."""
    replaced = 0
    values = {"job": job_id, "code": RejectCode.DUPLICATE_KEY.value, "message": "an earlier row has the same key"}
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor(name="placed", binary=True) as cursor:
        cursor.execute(_PLACED[policy].encode(), (job_id,))
        while rows := cursor.fetchmany(_PAGE):
            removed = [key for _, key, goes, is_other in rows if goes and not is_other]
            others = [index for index, _, goes, is_other in rows if is_other and not goes]
            connection.execute(text(_REMOVE_KEYS), {"job": job_id, "version": version_id, "keys": removed})
            vacant = [index for index, _, goes, _ in rows if goes]
            if policy is OnDuplicateKey.REJECT:
                connection.execute(text(_REJECT), {**values, "indexes": others})
            else:
                vacant += others
                replaced += sum(is_other for *_, is_other in rows)
            connection.execute(text(_VACATE), {"job": job_id, "indexes": vacant})
    return replaced


def save_counts(connection: Connection, job_id: UUID, counts: SyncCounts, named: int) -> None:
    """Save a sync's counts of rows, and how many of the collection's keys it has named. What earlier syncs have kept
    for their ends is forgotten: they can't be retried any more."""
    connection.execute(
        text("""
            update vectormill.syncs
            set unchanged = :unchanged, updated = :updated, repeated = :repeated, tokens_saved = :tokens_saved,
                named = :named
            where job_id = :job
        """),
        {**asdict(counts), "job": job_id, "named": named},
    )
    for statement in _FORGET_EARLIER:
        connection.execute(text(statement), {"job": job_id})


_EARLIER = """
    delete from vectormill.{TABLE} where job_id in (
      select b.job_id from vectormill.syncs a join vectormill.syncs b
        on b.version_id = a.version_id and b.last_slot < a.last_slot
      where a.job_id = :job)
"""
_FORGET_EARLIER = [_EARLIER.format(TABLE=table) for table in ("sync_seen", "sync_changes")]


def counts(connection: Connection, job_id: UUID) -> SyncCounts:
    """Return a sync's counts."""
    row = connection.execute(
        text("""
            select unchanged, updated, repeated, tokens_saved, removed, added, changed from vectormill.syncs
            where job_id = :job
        """),
        {"job": job_id},
    )
    found = row.mappings().one_or_none()
    return SyncCounts(**found) if found else SyncCounts()


# As in embeddings.py, the planner may know nothing of the job's rows: "offset 0" makes it begin with them, and look the
# others up.
_OF_COMMIT = "and i.index = any(:indexes)"
_EMBEDDED = """
    select i.key, i.index, i.identity, i.carried, t.tokens
    from vectormill.items i
    cross join lateral (select sum(e.tokens) as tokens from vectormill.{ROWS} e
                        where e.job_id = :job and e.index = i.index offset 0) t
    where i.job_id = :job and t.tokens is not null {OF_COMMIT}
"""
_KNOWN = """
    select i.*, k.slot from ({EMBEDDED}) i
    cross join lateral (select slot from vectormill.collection_keys k
                        where k.version_id = :version and k.key = i.key offset 0) k
"""
_CHANGE_KEYS = """
    update vectormill.collection_keys k
    set identity = i.identity, carried = i.carried, tokens = i.tokens, job_id = :job
    from ({KNOWN}) i where k.version_id = :version and k.slot = i.slot
"""
_ADD_KEYS = """
    insert into vectormill.collection_keys (version_id, key, identity, carried, tokens, job_id)
    select :version, i.key, i.identity, i.carried, i.tokens, :job
    from ({EMBEDDED}) i
    where (select k.slot from vectormill.collection_keys k where k.version_id = :version and k.key = i.key) is null
    order by i.index
"""
_DELETE_VECTORS = """
    delete from vectormill.collection_vectors v using ({KNOWN}) i where v.version_id = :version and v.slot = i.slot
"""
_ADD_VECTORS = """
    insert into vectormill.collection_vectors (version_id, slot, passage, start, stop, vector, half)
    select :version, i.slot, {PASSAGE}, e.vector, e.half
    from ({KNOWN}) i
    cross join lateral (select * from vectormill.{ROWS} e where e.job_id = :job and e.index = i.index offset 0) e
"""
# For files, which are written after the sync's end.
_HAS_FILES = "exists (select from vectormill.collection_versions where id = {VERSION} and output is not null)"
_NOTE_KEYS = """
    insert into vectormill.collection_changes (version_id, key)
    select :version, i.key from ({EMBEDDED}) i where {HAS_FILES}
"""
_PASSAGE = {"embeddings": "0, null, null", "passages": "e.passage, e.start, e.stop"}
_PUBLISH = {
    (rows, part): [
        statement.format(
            ROWS=rows,
            PASSAGE=passage,
            EMBEDDED=embedded,
            KNOWN=_KNOWN.format(EMBEDDED=embedded),
            HAS_FILES=_HAS_FILES.format(VERSION=":version"),
        )
        for statement in (_CHANGE_KEYS, _ADD_KEYS, _DELETE_VECTORS, _ADD_VECTORS, _NOTE_KEYS)
    ]
    for rows, passage in _PASSAGE.items()
    for part, of_commit in ((True, _OF_COMMIT), (False, ""))
    for embedded in [_EMBEDDED.format(ROWS=rows, OF_COMMIT=of_commit)]
}


def publish(
    connection: Connection, version_id: int, job_id: UUID, indexes: Sequence[int] | None, *, passages: bool
) -> None:
    """Show a sync's embedded items to readers of the collection: those of a commit, or `None` for all."""
    rows = "passages" if passages else "embeddings"
    values = {"version": version_id, "job": job_id, "indexes": list(indexes or ())}
    for statement in _PUBLISH[rows, indexes is not None]:
        connection.execute(text(statement), values)


_REMOVE_OF = """
    with doomed as (
      delete from vectormill.collection_keys k {WHICH} returning k.slot, k.key
    ), gone as (
      delete from vectormill.collection_vectors v using doomed d where v.version_id = %(version)s and v.slot = d.slot
    ), noted as (
      insert into vectormill.collection_changes (version_id, key)
      select %(version)s, d.key from doomed d where {HAS_FILES}
    ), theirs as ({{theirs}})
    select count(*) from doomed
"""
_REMOVED_HAS_FILES = _HAS_FILES.format(VERSION="%(version)s")
_REMOVE_UNSEEN = _REMOVE_OF.format(
    HAS_FILES=_REMOVED_HAS_FILES,
    WHICH="""
      where k.version_id = %(version)s and k.slot <= %(last_slot)s
        and not exists (select from vectormill.sync_seen s
                        where s.job_id = %(job)s and s.page = k.slot / %(page_slots)s
                          and get_bit(s.bits, k.slot %% %(page_slots)s) = 1)
    """,
)
#: Keys whose row was rejected, unless another row of this sync has given them new vectors.
_REMOVE_REJECTED = _REMOVE_OF.format(
    HAS_FILES=_REMOVED_HAS_FILES,
    WHICH="""
      using (select f.slot from vectormill.rejects r
             cross join lateral (select slot, job_id from vectormill.collection_keys f
                                 where f.version_id = %(version)s and f.key = r.key offset 0) f
             where r.job_id = %(job)s and r.code <> 'duplicate_key' and f.job_id <> %(job)s) r
      where k.version_id = %(version)s and k.slot = r.slot
    """,
)
_REMOVE_NAMED = _REMOVE_OF.format(
    HAS_FILES=_REMOVED_HAS_FILES,
    WHICH="""
      using vectormill.sync_changes s
      where s.job_id = %(job)s and s.identity is null and k.version_id = %(version)s and k.slot = s.slot
    """,
)
_REMOVE_GIVEN = _REMOVE_OF.format(
    HAS_FILES=_REMOVED_HAS_FILES,
    WHICH="""
      using unnest(%(keys)s::text[]) given(key) where k.version_id = %(version)s and k.key = given.key
    """,
)
_CHANGE_COLUMNS_OF = """
    with changed as (
      update vectormill.collection_keys k set identity = s.identity, carried = s.carried
      from vectormill.sync_changes s
      where s.job_id = :job and s.identity is not null and k.version_id = :version and k.slot = s.slot
      returning k.key
    )
    insert into vectormill.collection_changes (version_id, key) select :version, key from changed where {HAS_FILES}
"""
_CHANGE_COLUMNS = _CHANGE_COLUMNS_OF.format(HAS_FILES=_HAS_FILES.format(VERSION=":version"))
_COUNT_CHANGES = """
    select count(*) filter (where k.slot > :last_slot), count(*) filter (where k.slot <= :last_slot)
    from vectormill.items i
    cross join lateral (select slot, job_id from vectormill.collection_keys k
                        where k.version_id = :version and k.key = i.key offset 0) k
    where i.job_id = :job and k.job_id = :job
"""


def settle(
    connection: Connection, job_id: UUID, version_id: int, *, keep_rejected: bool, into: UserTable | None
) -> str | None:
    """Remove the keys that a completed sync doesn't name, or names as removed, and those of rejected rows; give the
    others their new columns; count what has changed. Settled again, it removes only keys of rejects. Keys go from the
    user's table `into`, too. Files of the collection are due then, with no problem yet.

    Return why it can't be settled, and nothing was done; `None`: it is.
    """
    row = connection.execute(
        text("""
            select is_whole, last_slot, settled_at is null as is_first, named, updated,
                   (select coalesce(sum(bit_count(bits)), 0) from vectormill.sync_seen where job_id = :job) as seen,
                   (select count(*) from vectormill.sync_changes
                    where job_id = :job and identity is not null) as columns
            from vectormill.syncs where job_id = :job for update
        """),
        {"job": job_id},
    ).one_or_none()
    if row is None:
        return "its collection has been dropped"
    if row.is_first and ((row.is_whole and row.seen != row.named) or row.columns != row.updated):
        return "the database has lost which keys its source named; sync again"
    values = {"job": job_id, "version": version_id, "last_slot": row.last_slot, "page_slots": PAGE_SLOTS}
    removed = 0
    if not keep_rejected:
        removed += _remove(connection, _REMOVE_REJECTED, values, into)
    if row.is_first:
        if row.is_whole:
            removed += _remove(connection, _REMOVE_UNSEEN, values, into)
        removed += _remove(connection, _REMOVE_NAMED, values, into)
        connection.execute(text(_CHANGE_COLUMNS), values)
        connection.execute(text("delete from vectormill.sync_seen where job_id = :job"), values)
        connection.execute(text("delete from vectormill.sync_changes where job_id = :job"), values)
    added, changed = connection.execute(text(_COUNT_CHANGES), values).one()
    connection.execute(
        text("""
            update vectormill.syncs
            set removed = removed + :removed, added = :added, changed = :changed, settled_at = clock_timestamp()
            where job_id = :job
        """),
        {"job": job_id, "removed": removed, "added": added, "changed": changed},
    )
    # Who waits for its files is told what comes of the next try, not of one before.
    connection.execute(
        text("update vectormill.collection_versions set output_problem = null where id = :version"), values
    )
    return None


def _remove(connection: Connection, statement: LiteralString, values: Mapping[str, Any], into: UserTable | None) -> int:
    theirs = user_table.deletion(into) if into else sql.SQL("select")
    with errors_as_sqlalchemys():
        found = psycopg_connection(connection).execute(sql.SQL(statement).format(theirs=theirs), values).fetchone()
    assert found
    return int(found[0])


def remove_keys(connection: Connection, version_id: int, keys: Sequence[str], *, into: UserTable | None) -> int:
    """Remove keys from a version, and from the user's table `into`, with columns that a sync has kept for its end.
    Return how many of them it had."""
    connection.execute(
        text("""
            update vectormill.sync_changes s set carried = null, identity = ''
            from vectormill.collection_keys k
            where k.version_id = :version and k.key = any(:keys) and s.slot = k.slot and s.identity is not null
        """),
        {"version": version_id, "keys": list(keys)},
    )
    return _remove(connection, _REMOVE_GIVEN, {"version": version_id, "keys": list(keys)}, into)


def running(connection: Connection, version_id: int) -> UUID | None:
    """Return the job of a version's sync that hasn't ended; None if there is none."""
    found = text("""
        select id from vectormill.jobs
        where version_id = :version and state not in ('completed', 'failed', 'cancelled')
    """)
    job: UUID | None = connection.execute(found, {"version": version_id}).scalar_one_or_none()
    return job


def version_of(connection: Connection, job_id: UUID) -> int | None:
    """Return the version that a sync is of; None if there is no such sync."""
    found = text("select version_id from vectormill.syncs where job_id = :job")
    version: int | None = connection.execute(found, {"job": job_id}).scalar_one_or_none()
    return version


def beside(connection: Connection, job_id: UUID) -> Sequence[UUID]:
    """Return the jobs that bring other versions of the collection up to the source of a sync."""
    found = text("select job_id from vectormill.syncs where beside = :job order by job_id")
    return list(connection.execute(found, {"job": job_id}).scalars())


def running_of(connection: Connection, collection_id: int) -> UUID | None:
    """Return the job of a sync, of any version of a collection, that hasn't ended; None if there is none."""
    found = text("""
        select j.id from vectormill.collection_versions v
        join vectormill.jobs j on j.version_id = v.id and j.state not in ('completed', 'failed', 'cancelled')
        where v.collection_id = :collection limit 1
    """)
    job: UUID | None = connection.execute(found, {"collection": collection_id}).scalar_one_or_none()
    return job


def forget(connection: Connection, job_id: UUID) -> None:
    """Forget a sync whose staging is undone or begun anew."""
    for statement in _FORGET:
        connection.execute(text(statement), {"job": job_id})


_FORGET = (
    "delete from vectormill.sync_seen where job_id = :job",
    "delete from vectormill.sync_changes where job_id = :job",
    "delete from vectormill.syncs where job_id = :job",
)


def is_latest(connection: Connection, job_id: UUID) -> bool:
    """Return True if a sync's version is there, and no other sync of it began after this one."""
    found = text("""
        select exists (select from vectormill.syncs a
                       join vectormill.collection_versions v on v.id = a.version_id and v.state <> 'gone'
                       where a.job_id = :job
                         and not exists (select from vectormill.syncs b
                                         where b.version_id = a.version_id and b.last_slot > a.last_slot))
    """)
    return bool(connection.execute(found, {"job": job_id}).scalar_one())
