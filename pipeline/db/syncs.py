"""Syncs: the rows that they stage, what commits publish, and what their end removes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.chunks import RejectCode
from pipeline.core.collections import OnDuplicateKey, SyncCounts

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


# The rows of a key: of those that don't count, `last` and `first` delete the items, `reject` keeps them as rejects.
_PLACED = """
    placed as (
      select index, key, identity = '' as goes,
             row_number() over (partition by key order by index {ORDER}) > 1 as is_other
      from vectormill.items where job_id = :job and key is not null
    )
"""
_REMOVE_KEYS_OF = """
    with {PLACED}
    insert into vectormill.sync_changes (job_id, slot)
    select :job, k.slot from placed p
    join vectormill.collection_keys k on k.version_id = :version and k.key = p.key
    where p.goes and not p.is_other
    on conflict (job_id, slot) do update set identity = null, carried = null
"""
# Each index looks its chunk up, instead of each chunk all of them.
_CHUNK_OF = """
    cross join lateral (select id from vectormill.chunks where job_id = :job and first_index <= d.index
                        order by first_index desc limit 1) c
"""
_VACATE_OF = """
    with {PLACED}, doomed as (
      delete from vectormill.items i using placed p
      where i.job_id = :job and i.index = p.index and (p.goes or p.is_other and :deletes)
      returning i.index, p.is_other
    ), unsaid as (
      delete from vectormill.rejects r using doomed d where r.job_id = :job and r.index = d.index returning r.index
    ), counted as (
      select c.id, count(*) as vacant, count(u.index) as unsaid
      from doomed d {CHUNK_OF} left join unsaid u on u.index = d.index group by c.id
    ), moved as (
      update vectormill.chunks c
      set vacant = c.vacant + n.vacant, rejected = c.rejected - n.unsaid,
          state = case when c.items = c.vacant + n.vacant + c.rejected - n.unsaid then 'done' else 'pending' end
      from counted n where c.id = n.id
    )
    select count(*) filter (where is_other) from doomed
"""
_REJECT_OTHERS_OF = """
    with {PLACED}, doomed as (
      delete from vectormill.items i using placed p
      where i.job_id = :job and i.index = p.index and p.is_other and i.text is not null
      returning i.index, i.key
    ), kept as (
      insert into vectormill.items (job_id, index, key) select :job, index, key from doomed
    ), said as (
      insert into vectormill.rejects (job_id, index, key, code, message)
      select :job, index, key, :code, :message from doomed
    ), counted as (
      select c.id, count(*) as rejected from doomed d {CHUNK_OF} group by c.id
    )
    update vectormill.chunks c
    set rejected = c.rejected + n.rejected,
        state = case when c.items = c.vacant + c.rejected + n.rejected then 'done' else c.state end
    from counted n where c.id = n.id
"""
_SETTLE_KEYS = {
    policy: [
        statement.format(
            PLACED=_PLACED.format(ORDER="desc" if policy is OnDuplicateKey.LAST else ""), CHUNK_OF=_CHUNK_OF
        )
        for statement in (_REMOVE_KEYS_OF, _REJECT_OTHERS_OF, _VACATE_OF)
    ]
    for policy in OnDuplicateKey
}


def settle_keys(connection: Connection, job_id: UUID, version_id: int, policy: OnDuplicateKey) -> int:
    """Settle the staged rows of a sync before it is queued: one row a key counts, and keys that go leave no item.
    Return the number of rows that another one replaces."""
    remove, reject, vacate = map(text, _SETTLE_KEYS[policy])
    connection.execute(remove, {"job": job_id, "version": version_id})
    rejects = policy is OnDuplicateKey.REJECT
    if rejects:
        message = "an earlier row has the same key"
        connection.execute(reject, {"job": job_id, "code": RejectCode.DUPLICATE_KEY.value, "message": message})
    return int(connection.execute(vacate, {"job": job_id, "deletes": not rejects}).scalar_one())


def save_counts(connection: Connection, job_id: UUID, counts: SyncCounts) -> None:
    """Save a sync's counts of rows."""
    connection.execute(
        text("""
            update vectormill.syncs
            set unchanged = :unchanged, updated = :updated, repeated = :repeated, tokens_saved = :tokens_saved
            where job_id = :job
        """),
        {**asdict(counts), "job": job_id},
    )


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


# As in embeddings.py, the planner may know nothing of the job's rows; all of these are look-ups by index.
_OF_COMMIT = "and i.index = any(:indexes)"
_EMBEDDED = """
    vectormill.items i
    cross join lateral (select sum(e.tokens) as tokens from vectormill.{ROWS} e
                        where e.job_id = :job and e.index = i.index) t
"""
_CHANGE_KEYS = """
    update vectormill.collection_keys k
    set identity = i.identity, carried = i.carried, tokens = t.tokens, job_id = :job
    from {EMBEDDED}
    where i.job_id = :job and t.tokens is not null and k.version_id = :version and k.key = i.key {OF_COMMIT}
"""
_ADD_KEYS = """
    insert into vectormill.collection_keys (version_id, key, identity, carried, tokens, job_id)
    select :version, i.key, i.identity, i.carried, t.tokens, :job
    from {EMBEDDED}
    where i.job_id = :job and t.tokens is not null {OF_COMMIT}
      and not exists (select from vectormill.collection_keys k where k.version_id = :version and k.key = i.key)
    order by i.index
"""
_DELETE_VECTORS = """
    delete from vectormill.collection_vectors v
    using {EMBEDDED}, vectormill.collection_keys k
    where i.job_id = :job and t.tokens is not null and k.version_id = :version and k.key = i.key
      and v.version_id = :version and v.slot = k.slot {OF_COMMIT}
"""
_ADD_VECTORS = """
    insert into vectormill.collection_vectors (version_id, slot, passage, start, stop, vector, half)
    select :version, k.slot, {PASSAGE}, e.vector, e.half
    from vectormill.items i
    join vectormill.{ROWS} e on e.job_id = :job and e.index = i.index
    join vectormill.collection_keys k on k.version_id = :version and k.key = i.key
    where i.job_id = :job {OF_COMMIT}
"""
_PASSAGE = {"embeddings": "0, null, null", "passages": "e.passage, e.start, e.stop"}
_PUBLISH = {
    (rows, part): [
        statement.format(ROWS=rows, OF_COMMIT=of_commit, EMBEDDED=_EMBEDDED.format(ROWS=rows), PASSAGE=passage)
        for statement in (_CHANGE_KEYS, _ADD_KEYS, _DELETE_VECTORS, _ADD_VECTORS)
    ]
    for rows, passage in _PASSAGE.items()
    for part, of_commit in ((True, _OF_COMMIT), (False, ""))
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
      delete from vectormill.collection_keys k {WHICH} returning k.slot
    ), gone as (
      delete from vectormill.collection_vectors v using doomed d where v.version_id = :version and v.slot = d.slot
    )
    select count(*) from doomed
"""
_REMOVE_UNSEEN = _REMOVE_OF.format(
    WHICH="""
      where k.version_id = :version and k.slot <= :last_slot
        and not exists (select from vectormill.sync_seen s
                        where s.job_id = :job and s.page = k.slot / :page_slots
                          and get_bit(s.bits, k.slot % :page_slots) = 1)
    """
)
#: Keys whose row was rejected, unless another row of this sync has given them new vectors.
_REMOVE_REJECTED = _REMOVE_OF.format(
    WHICH="""
      using vectormill.rejects r
      where r.job_id = :job and r.code <> 'duplicate_key' and k.version_id = :version and k.key = r.key
        and k.job_id <> :job
    """
)
_REMOVE_NAMED = _REMOVE_OF.format(
    WHICH="""
      using vectormill.sync_changes s
      where s.job_id = :job and s.identity is null and k.version_id = :version and k.slot = s.slot
    """
)
_CHANGE_COLUMNS = """
    update vectormill.collection_keys k set identity = s.identity, carried = s.carried
    from vectormill.sync_changes s
    where s.job_id = :job and s.identity is not null and k.version_id = :version and k.slot = s.slot
"""
_COUNT_CHANGES = """
    select count(*) filter (where k.slot > :last_slot), count(*) filter (where k.slot <= :last_slot)
    from vectormill.items i join vectormill.collection_keys k on k.version_id = :version and k.key = i.key
    where i.job_id = :job and k.job_id = :job
"""


def settle(connection: Connection, job_id: UUID, version_id: int, *, keep_rejected: bool) -> SyncCounts:
    """Remove the keys that a completed sync doesn't name, or names as removed, and those of rejected rows; give the
    others their new columns. Return all counts. Again, it removes only keys of rejects.
    """
    row = connection.execute(
        text("""
            select is_whole, last_slot, settled_at is null as is_first from vectormill.syncs
            where job_id = :job for update
        """),
        {"job": job_id},
    ).one()
    values = {"job": job_id, "version": version_id, "last_slot": row.last_slot, "page_slots": PAGE_SLOTS}
    removed = 0
    if not keep_rejected:
        removed += connection.execute(text(_REMOVE_REJECTED), values).scalar_one()
    if row.is_first:
        if row.is_whole:
            removed += connection.execute(text(_REMOVE_UNSEEN), values).scalar_one()
        removed += connection.execute(text(_REMOVE_NAMED), values).scalar_one()
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
    return counts(connection, job_id)


def running(connection: Connection, version_id: int) -> UUID | None:
    """Return the job of a version's sync that hasn't ended; None if there is none."""
    found = text("""
        select id from vectormill.jobs
        where version_id = :version and state not in ('completed', 'failed', 'cancelled')
    """)
    job: UUID | None = connection.execute(found, {"version": version_id}).scalar_one_or_none()
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


def has_later(connection: Connection, job_id: UUID) -> bool:
    """Return True if another sync of the same version began after this one."""
    found = text("""
        select exists (select from vectormill.syncs a join vectormill.syncs b on b.version_id = a.version_id
                       where a.job_id = :job and b.job_id > a.job_id)
    """)
    return bool(connection.execute(found, {"job": job_id}).scalar_one())
