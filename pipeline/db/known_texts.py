"""Known texts: the item that each text of a workspace and vector space was first given to, whose vector others copy.

The row says who embeds the text; whether the vector is there is said by the vector alone. So nothing is updated when it
comes, and a row whose item was rejected, cancelled or purged is simply taken over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.chunks import Claim


@dataclass(frozen=True, slots=True)
class KnownText:
    """Text that another item has."""

    hash: bytes
    job_id: UUID
    index: int
    #: Its vector is in Postgres.
    is_embedded: bool
    #: A running chunk has the item, and hasn't rejected it.
    is_under_way: bool
    #: Transaction that wrote the row last: who has it taken over or confirmed meanwhile, has changed this.
    written_by: int


def claim(connection: Connection, claim: Claim, hashes: Sequence[bytes], indexes: Sequence[int]) -> set[bytes]:
    """Make items of a chunk the first of their texts. Return the hashes of texts that nobody had before."""
    rows = connection.execute(
        # In order, so that two claims of the same texts wait for each other in the same order.
        text("""
            insert into vectormill.known_texts (workspace_id, vector_space_id, hash, job_id, index)
            select j.workspace_id, j.vector_space_id, given.hash, j.id, given.index
            from vectormill.jobs j
            cross join unnest(cast(:hashes as bytea[]), cast(:indexes as bigint[])) given(hash, index)
            where j.id = :job order by given.hash
            on conflict do nothing returning hash
        """),
        {"job": claim.job_id, "hashes": list(hashes), "indexes": list(indexes)},
    )
    return {bytes(row[0]) for row in rows}


# Subqueries per row, not joins, for the reason that embeddings.py gives.
_LOOK_UP_OF = """
    select k.hash, k.job_id, k.index,
           (select e.index from {rows} e where e.job_id = k.job_id and e.index = k.index limit 1) is not null,
           (select r.index from vectormill.rejects r where r.job_id = k.job_id and r.index = k.index) is null
             and coalesce((select c.state = 'running' from vectormill.chunks c
                           where c.job_id = k.job_id and c.first_index <= k.index
                           order by c.first_index desc limit 1), false),
           k.xmin::text::bigint
    from vectormill.jobs j
    cross join unnest(cast(:hashes as bytea[])) given(hash)
    join vectormill.known_texts k
      on k.workspace_id = j.workspace_id and k.vector_space_id = j.vector_space_id and k.hash = given.hash
    where j.id = :job
"""
_LOOK_UP = {
    False: _LOOK_UP_OF.format(rows="vectormill.embeddings"),
    True: _LOOK_UP_OF.format(rows="vectormill.passages"),
}


def look_up(connection: Connection, claim: Claim, hashes: Sequence[bytes]) -> list[KnownText]:
    """Return what is known of texts, in the workspace and vector space of the claim's job."""
    rows = connection.execute(
        text(_LOOK_UP[claim.options.splits]),
        {"job": claim.job_id, "hashes": list(hashes)},
    )
    return [KnownText(bytes(row[0]), *row[1:]) for row in rows]


def confirm(connection: Connection, claim: Claim, own: Sequence[KnownText]) -> set[bytes]:
    """Confirm that items of a chunk, which had these texts first in an earlier claim, are embedded by this one. Return
    the hashes of those that nobody has taken over."""
    rows = connection.execute(
        text("""
            with own as (
              select k.workspace_id, k.vector_space_id, k.hash
              from vectormill.jobs j
              cross join unnest(cast(:hashes as bytea[]), cast(:indexes as bigint[])) given(hash, index)
              join vectormill.known_texts k
                on k.workspace_id = j.workspace_id and k.vector_space_id = j.vector_space_id and k.hash = given.hash
                and k.job_id = j.id and k.index = given.index
              where j.id = :job order by k.hash for update of k
            )
            update vectormill.known_texts k set index = k.index from own
            where k.workspace_id = own.workspace_id and k.vector_space_id = own.vector_space_id and k.hash = own.hash
            returning k.hash
        """),
        {"job": claim.job_id, "hashes": [each.hash for each in own], "indexes": [each.index for each in own]},
    )
    return {bytes(row[0]) for row in rows}


def take_over(connection: Connection, claim: Claim, left: Sequence[KnownText], indexes: Sequence[int]) -> set[bytes]:
    """Make items of a chunk the first of texts that were `left` without a vector. Return the hashes of those that
    nobody else has taken over or confirmed meanwhile."""
    rows = connection.execute(
        text("""
            with stale as (
              select k.workspace_id, k.vector_space_id, k.hash, given.index
              from vectormill.jobs j
              cross join unnest(cast(:hashes as bytea[]), cast(:jobs as uuid[]), cast(:before as bigint[]),
                                cast(:indexes as bigint[]), cast(:writers as bigint[]))
                given(hash, job_id, before, index, writer)
              join vectormill.known_texts k
                on k.workspace_id = j.workspace_id and k.vector_space_id = j.vector_space_id and k.hash = given.hash
                and k.job_id = given.job_id and k.index = given.before and k.xmin::text::bigint = given.writer
              where j.id = :job order by k.hash for update of k
            )
            update vectormill.known_texts k set job_id = :job, index = stale.index from stale
            where k.workspace_id = stale.workspace_id and k.vector_space_id = stale.vector_space_id
              and k.hash = stale.hash
            returning k.hash
        """),
        {
            "job": claim.job_id,
            "hashes": [each.hash for each in left],
            "jobs": [each.job_id for each in left],
            "before": [each.index for each in left],
            "indexes": list(indexes),
            "writers": [each.written_by for each in left],
        },
    )
    return {bytes(row[0]) for row in rows}


def forget(connection: Connection, first_id: UUID, end_id: UUID, limit: int) -> int:
    """Delete up to `limit` rows that name an item of a job from `first_id` to before `end_id`. Return their number.
    Rows that a worker is taking over are left to it."""
    return connection.execute(
        text("""
            delete from vectormill.known_texts
            where ctid = any(array(select ctid from vectormill.known_texts
                                   where job_id >= :first and job_id < :end limit :limit for update skip locked))
        """),
        {"first": first_id, "end": end_id, "limit": limit},
    ).rowcount
