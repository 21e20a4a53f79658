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
      select coalesce(a.beside, b.beside, a.job_id, b.job_id) as job_id, a.is_whole,
             a.job_id as one_job, a.last_slot as in_one, a.settled_at is not null as ended_in_one,
             b.job_id as other_job, b.last_slot as in_other, b.settled_at is not null as ended_in_other
      from (select * from vectormill.syncs where version_id = :one) a
      full join (select * from vectormill.syncs where version_id = :other) b
        on coalesce(b.beside, b.job_id) = coalesce(a.beside, a.job_id)
    ), equal as (
      -- A whole sync that reached both made them equal.
      select in_one, in_other from pairs where is_whole and ended_in_one and ended_in_other
      order by in_one desc limit 1
    ), later as (
      select p.*, p.in_one > e.in_one and p.in_other > e.in_other and ended_in_one and ended_in_other as is_in_both
      from pairs p, equal e
      where (p.in_one > e.in_one or p.in_other > e.in_other) and ({ONE_CHANGED} or {OTHER_CHANGED})
    )
    -- What came after it, and changed either, must have reached both, in the same order.
    select e.in_one is not null,
           (select l.job_id
            from (select *, rank() over (order by in_one) = rank() over (order by in_other) as is_in_order
                  from later) l
            where not (coalesce(is_in_both, false) and is_in_order)
            order by coalesce(in_one, in_other) limit 1)
    from (values (1)) one left join equal e on true
"""
# A sync that failed, or was cancelled, has changed what it had committed; of a purged job nobody knows it.
_CHANGED = """
    (coalesce(p.{ENDED}, false) or (p.{JOB} is not null and (
      not exists (select from vectormill.jobs j where j.id = p.{JOB})
      or exists (select from vectormill.chunks c where c.job_id = p.{JOB} and c.embedded + c.reused > 0))))
"""
_DIFFERS = _DIFFERENCE.format(
    ONE_CHANGED=_CHANGED.format(ENDED="ended_in_one", JOB="one_job"),
    OTHER_CHANGED=_CHANGED.format(ENDED="ended_in_other", JOB="other_job"),
)


class Difference(NamedTuple):
    """Difference between two versions."""

    #: A whole sync has reached both.
    is_filled: bool
    #: The first sync since then that reached only one of them, or in another order, by the job of the version that was
    #: current then; `None`: there is none.
    missed: UUID | None


def difference(connection: Connection, version_id: int, other_id: int) -> Difference:
    """Return how two versions of a collection differ by the syncs that have ended."""
    row = connection.execute(text(_DIFFERS), {"one": version_id, "other": other_id}).one()
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
    """Return versions that are gone, without those whose syncs haven't ended, or of which keys are being forgotten."""
    rows = connection.execute(
        text("""
            select v.id from vectormill.collection_versions v
            where v.state = 'gone' and not exists (
              select from vectormill.jobs j
              where j.version_id = v.id and j.state not in ('completed', 'failed', 'cancelled'))
            and not exists (
              select from vectormill.forgets f join vectormill.collections c on c.workspace_id = f.workspace_id
              where f.finished_at is null and c.id = v.collection_id)
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
_FORGET = [
    *(_FORGET_OF.format(TABLE=table) for table in ("sync_seen", "sync_changes")),
    "delete from vectormill.collection_changes where version_id = :version",
]


class Sample(NamedTuple):
    """Key that two versions have, with its vector in each; of a text with passages, the first one's."""

    key: str
    vectors: tuple[str, str]


_SAMPLE = """
    select k.key, {VECTOR_A}, {VECTOR_B}
    from (select key, slot from vectormill.collection_keys tablesample system (:percent)
          where version_id = :a order by random() limit :count) k
    join vectormill.collection_keys o on o.version_id = :b and o.key = k.key
"""
_VECTOR = """
    (select coalesce(vector, half::vector)::text from vectormill.collection_vectors v
     where v.version_id = :{VERSION} and v.slot = {KEY}.slot order by passage limit 1)
"""
_SAMPLE_KEYS = _SAMPLE.format(
    VECTOR_A=_VECTOR.format(VERSION="a", KEY="k"), VECTOR_B=_VECTOR.format(VERSION="b", KEY="o")
)


def sample(connection: Connection, version_id: int, other_id: int, count: int, percent: float) -> list[Sample]:
    """Return at most `count` keys that both versions have, drawn at random from `percent` of the first one's pages."""
    values = {"a": version_id, "b": other_id, "count": count, "percent": percent}
    rows = connection.execute(text(_SAMPLE_KEYS), values)
    return [Sample(key, (one, other)) for key, one, other in rows if one and other]


def mean_tokens(connection: Connection, version_id: int, percent: float) -> float:
    """Return the mean number of tokens of a text in `percent` of a version's pages; 0 without any."""
    found = text("""
        select coalesce(avg(tokens), 0)::float8
        from vectormill.collection_keys tablesample system (:percent) where version_id = :version
    """)
    return float(connection.execute(found, {"version": version_id, "percent": percent}).scalar_one())
