"""Versions of collections: what two of them differ in, which one readers see, and those that go."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from pipeline.core.collections import VersionState
from pipeline.core.errors import Waiting

#: Longest time between two tries to drop tables that are in use.
_BUSY_SECONDS = 60.0

# Syncs of two versions in pairs, which had the same source. A sync's last slot says when it began.
_DIFFERENCE = """
    with pairs as (
      select least(a.last_slot, b.last_slot) as began,
             coalesce(a.beside, b.beside, a.job_id, b.job_id) as job_id,
             a.settled_at is not null as in_one, b.settled_at is not null as in_other, a.is_whole
      from (select * from vectormill.syncs where version_id = :one) a
      full join (select * from vectormill.syncs where version_id = :other) b
        on coalesce(b.beside, b.job_id) = coalesce(a.beside, a.job_id)
    ), equal as (
      -- A whole sync that reached both made them equal; what came later must have reached both, too.
      select max(began) as began from pairs where is_whole and in_one and in_other
    )
    select equal.began is not null as is_filled,
           (select p.job_id from pairs p where p.began > equal.began and p.in_one <> p.in_other
            order by p.began limit 1) as missed
    from equal
"""


class Difference(NamedTuple):
    """Difference between two versions."""

    #: A whole sync has reached both.
    is_filled: bool
    #: The first sync since then that reached only one of them, by the job of what was the current version then;
    #: `None`: there is none.
    missed: UUID | None


def difference(connection: Connection, version_id: int, other_id: int) -> Difference:
    """Return how two versions of a collection differ by the syncs that have ended."""
    row = connection.execute(text(_DIFFERENCE), {"one": version_id, "other": other_id}).one()
    return Difference(*row)


def move(connection: Connection, moves: Mapping[int, VersionState], *, keep: timedelta | None = None) -> None:
    """Give versions other states, in this order. A previous one is kept for the time `keep`."""
    for version, state in moves.items():
        connection.execute(
            text("""
                update vectormill.collection_versions
                set state = :state, kept_until = case :state when 'previous' then now() + :keep end
                where id = :version
            """),
            {"version": version, "state": state, "keep": keep},
        )


def show_current(connection: Connection, collection_id: int) -> None:
    """Let the collection's view show its current version.

    Raises:
        sqlalchemy.exc.DBAPIError: the vectors' type changes, and something depends on the view.
    """
    connection.execute(text("select vectormill.show_collection(:collection)"), {"collection": collection_id})


def retire(connection: Connection) -> None:
    """Let previous versions go whose time has passed."""
    connection.execute(
        text("""
            update vectormill.collection_versions set state = 'gone'
            where state = 'previous' and kept_until < now()
        """)
    )


def gone(connection: Connection, limit: int) -> Sequence[int]:
    """Return versions that are gone, without those whose syncs haven't ended."""
    rows = connection.execute(
        text("""
            select v.id from vectormill.collection_versions v
            where v.state = 'gone' and not exists (
              select from vectormill.jobs j
              where j.version_id = v.id and j.state not in ('completed', 'failed', 'cancelled'))
            order by v.id limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def drop(connection: Connection, version_id: int) -> None:
    """Drop the tables of a version that is gone.

    Raises:
        Waiting: others use a collection just now. Readers of all collections would wait behind this.
    """
    connection.execute(text("set local lock_timeout = '200ms'"))
    for statement in _FORGET:
        connection.execute(text(statement), {"version": version_id})
    try:
        connection.execute(text("select vectormill.drop_version(:version)"), {"version": version_id})
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable):
            raise
        raise Waiting(f"the tables of version {version_id} are in use", most_seconds=_BUSY_SECONDS) from error


_FORGET_OF = """
    delete from vectormill.{TABLE} where job_id in (select job_id from vectormill.syncs where version_id = :version)
"""
_FORGET = [_FORGET_OF.format(TABLE=table) for table in ("sync_seen", "sync_changes")]


class Sample(NamedTuple):
    """Key that two versions have, with its vector in each; of a text with passages, the first one's."""

    key: str
    vectors: tuple[str, str]


_SAMPLE = """
    select k.key, {VECTOR_A}, {VECTOR_B}
    from (select distinct k.slot
          from (select least + floor(random() * (most - least + 1))::bigint as place
                from (select min(slot) as least, max(slot) as most from vectormill.collection_keys
                      where version_id = :a) bounds, generate_series(1, :count)) drawn,
               lateral (select slot from vectormill.collection_keys
                        where version_id = :a and slot >= place order by slot limit 1) k) s
    join vectormill.collection_keys k on k.version_id = :a and k.slot = s.slot
    join vectormill.collection_keys o on o.version_id = :b and o.key = k.key
"""
_VECTOR = """
    (select coalesce(vector, half::vector)::text from vectormill.collection_vectors v
     where v.version_id = :{VERSION} and v.slot = {KEY}.slot order by passage limit 1)
"""
_SAMPLE_KEYS = _SAMPLE.format(
    VECTOR_A=_VECTOR.format(VERSION="a", KEY="k"), VECTOR_B=_VECTOR.format(VERSION="b", KEY="o")
)


def sample(connection: Connection, version_id: int, other_id: int, count: int) -> list[Sample]:
    """Return at most `count` keys, drawn at random, that both versions have."""
    rows = connection.execute(text(_SAMPLE_KEYS), {"a": version_id, "b": other_id, "count": count})
    return [Sample(key, (one, other)) for key, one, other in rows if one and other]


def tokens(connection: Connection, version_id: int) -> int:
    """Return the tokens of all texts of a version."""
    found = text("select coalesce(sum(tokens), 0) from vectormill.collection_keys where version_id = :version")
    return int(connection.execute(found, {"version": version_id}).scalar_one())
