"""Read-only queries of the dashboard's overview. Each is bounded, since every open page asks them again and again.

`workspace_id` is None where the page covers every workspace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

#: Newest jobs among which the last day's failures are looked for.
NEWEST_JOBS = 1_000
#: Age up to which a progress snapshot tells a model's pace.
_FRESH_SECONDS = 10
_MOST_RUNNING = 200
_MOST_LOSSES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Work that waits for a model, or is under way."""

    model: str
    jobs: int
    items: int
    #: Chunks that wait or run.
    chunks: int
    #: Pace of the last minute; 0: nothing was committed, or no dispatcher tells it.
    items_per_second: float


def waiting(connection: Connection, workspace_id: int | None) -> list[Waiting]:
    """Return the work of queued and running jobs by model, the most items first, by the last progress snapshots."""
    rows = connection.execute(
        text("""
            select model_name as model, count(*) as jobs,
                   sum(coalesce((progress->'items'->>'pending')::bigint, items_total))::bigint as items,
                   sum(coalesce((progress->'chunks'->>'pending')::bigint, 0)
                       + coalesce((progress->'chunks'->>'running')::bigint, 0))::bigint as chunks,
                   coalesce(sum((progress->'rate'->>'items_per_second')::float8)
                     filter (where (progress->>'as_of')::timestamptz > now() - make_interval(secs => :fresh)), 0)
                     as items_per_second
            from vectormill.jobs j
            -- With the condition of the index on active jobs, here and below.
            where j.state not in ('completed', 'failed', 'cancelled') and state in ('queued', 'running')
              and (j.workspace_id = :workspace or cast(:workspace as bigint) is null)
            group by 1 order by items desc, 1
        """),
        {"workspace": workspace_id, "fresh": _FRESH_SECONDS},
    )
    return [Waiting(**row) for row in rows.mappings()]


def paused_by_system(connection: Connection, workspace_id: int | None, limit: int) -> list[RowMapping]:
    """Return the newest jobs that wait for a person to mend something: `id, name, reason, message, jobs`, the last one
    the number of all of them."""
    rows = connection.execute(
        text("""
            select id, name, reason, message, count(*) over () as jobs from vectormill.jobs j
            where j.state not in ('completed', 'failed', 'cancelled') and state = 'paused'
              and reason is distinct from 'by_user'
              and (j.workspace_id = :workspace or cast(:workspace as bigint) is null)
            order by id desc limit :limit
        """),
        {"workspace": workspace_id, "limit": limit},
    )
    return list(rows.mappings())


def stuck(connection: Connection, workspace_id: int | None, seconds: float) -> list[RowMapping]:
    """Return the models with running jobs none of which has committed anything for so many seconds: `model, jobs,
    moved_at`. Jobs of every workspace tell if a model moves; those of one are counted."""
    rows = connection.execute(
        text("""
            with running as (
              select j.id, j.workspace_id, j.model_name, greatest(j.started_at, j.resumed_at, (
                       select u.created_at from vectormill.usage u where u.job_id = j.id
                       order by u.created_at desc limit 1)) as moved_at
              from vectormill.jobs j
              where j.state not in ('completed', 'failed', 'cancelled') and j.state = 'running'
              order by j.id limit :most
            )
            select * from (
              select model_name as model, max(moved_at) as moved_at,
                     count(*) filter (where workspace_id = :workspace or cast(:workspace as bigint) is null) as jobs
              from running group by 1
            ) by_model
            where moved_at < now() - make_interval(secs => :age) and jobs > 0 order by 1
        """),
        {"workspace": workspace_id, "age": seconds, "most": _MOST_RUNNING},
    )
    return list(rows.mappings())


def failed_today(connection: Connection, workspace_id: int | None, limit: int) -> list[RowMapping]:
    """Return the newest of the last day's failed jobs: `id, name, reason, message, finished_at, mended, jobs`.

    `mended`: a newer job of the name is completed. `jobs`: the number of all of them, among the newest `NEWEST_JOBS`.
    """
    rows = connection.execute(
        text("""
            with newest as (
              select id, workspace_id, name, state, reason, message, finished_at from vectormill.jobs j
              where (j.workspace_id = :workspace or cast(:workspace as bigint) is null) order by id desc limit :newest
            )
            select id, name, reason, message, finished_at, count(*) over () as jobs,
                   exists (select from newest n where n.name = j.name and n.workspace_id = j.workspace_id
                           and n.id > j.id and n.state = 'completed') as mended
            from newest j where state = 'failed' and finished_at > now() - interval '1 day'
            order by id desc limit :limit
        """),
        {"workspace": workspace_id, "newest": NEWEST_JOBS, "limit": limit},
    )
    return list(rows.mappings())


def rejected_today(connection: Connection, workspace_id: int | None) -> int:
    """Return the rejects of jobs that haven't ended, or ended within the last day, among the newest `NEWEST_JOBS`."""
    rows = connection.execute(
        text("""
            select coalesce(sum((coalesce(receipt, progress)->'items'->>'rejected')::bigint), 0)::bigint
            from (select receipt, progress, finished_at from vectormill.jobs j
                  where (j.workspace_id = :workspace or cast(:workspace as bigint) is null)
                  order by id desc limit :newest) newest
            where finished_at is null or finished_at > now() - interval '1 day'
        """),
        {"workspace": workspace_id, "newest": NEWEST_JOBS},
    )
    return int(rows.scalar_one())


def lost_claims_today(connection: Connection, workspace_id: int | None) -> int:
    """Return the number of claims lost within the last day, counted up to 10,000."""
    rows = connection.execute(
        text("""
            select count(*) from (
              select from vectormill.models m
              join vectormill.claim_losses l on l.model = m.name and l.lost_at > now() - interval '1 day'
              join vectormill.jobs j on j.id = l.job_id
                and (j.workspace_id = :workspace or cast(:workspace as bigint) is null)
              limit :most
            ) lost
        """),
        {"workspace": workspace_id, "most": _MOST_LOSSES},
    )
    return int(rows.scalar_one())


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """Collection, with the age of what it holds."""

    id: int
    name: str
    expect_every: timedelta | None
    created_at: datetime
    synced_at: datetime | None
    #: Its sync that hasn't ended.
    running: UUID | None
    #: Why its files can't be written; `None`: they can, or it has none.
    output_problem: str | None

    @property
    def stale_seconds(self) -> float | None:
        """Seconds beyond the expected time since the last sync; `None`: it isn't stale."""
        if self.expect_every is None:
            return None
        late = datetime.now(UTC) - (self.synced_at or self.created_at) - self.expect_every
        return late.total_seconds() if late > timedelta() else None


def freshness(connection: Connection, workspace_id: int | None, limit: int) -> list[Freshness]:
    """Return collections, the most overdue ones first, then by name."""
    rows = connection.execute(
        text("""
            select c.id, c.name, c.expect_every, c.created_at, s.synced_at, v.output_problem,
                   (select j.id from vectormill.jobs j
                    where j.version_id = v.id and j.state not in ('completed', 'failed', 'cancelled')) as running
            from vectormill.collections c
            join vectormill.collection_versions v on v.collection_id = c.id and v.state = 'current'
            cross join lateral (select max(settled_at) as synced_at from vectormill.syncs
                                where version_id = v.id) s
            where c.workspace_id = :workspace or cast(:workspace as bigint) is null
            order by greatest(now() - c.expect_every - coalesce(s.synced_at, c.created_at), interval '0')
                       desc nulls last, c.name, c.id
            limit :limit
        """),
        {"workspace": workspace_id, "limit": limit},
    )
    return [Freshness(**row) for row in rows.mappings()]


def hourly_tokens(connection: Connection, workspace_id: int | None, hours: Sequence[datetime]) -> dict[datetime, int]:
    """Return the tokens of jobs and requests in each of these hours, given by their beginnings."""
    rows = connection.execute(
        text("""
            -- Per workspace and hour, to read the index alone.
            select h.hour, sum(u.tokens)::bigint
            from unnest(cast(:hours as timestamptz[])) as h (hour)
            cross join vectormill.workspaces w cross join lateral (
              select coalesce(sum(total_tokens), 0) as tokens from vectormill.usage
              where workspace_id = w.id and created_at >= h.hour and created_at < h.hour + interval '1 hour'
            ) u
            where w.id = :workspace or cast(:workspace as bigint) is null
            group by 1
        """),
        {"workspace": workspace_id, "hours": list(hours)},
    )
    return {row[0]: row[1] for row in rows}
