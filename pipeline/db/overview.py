"""Read-only queries of the dashboard's overview. Each is bounded, since every open page asks them again and again.

`workspace_id` is None where the page covers every workspace.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from pipeline.core.collection_status import stale_seconds

#: Newest ended jobs that the last day's failures are looked for among.
NEWEST_ENDED = 2_000
#: Age up to which a progress snapshot tells a model's pace.
_FRESH_SECONDS = 10
#: Running jobs of a model whose last commits tell if it moves.
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
    """Return the work of queued and running jobs by model, the most items first, by the last progress snapshots. Jobs
    whose chunks are all done wait for no worker, and aren't among them."""
    rows = connection.execute(
        # Open chunks are looked for as in `jobs.without_open_chunks`, here and below, and for the same reason.
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
              and exists (select from vectormill.chunks c
                          where c.job_id between j.id and j.id and c.state in ('pending', 'running')
                          order by c.job_id, c.id limit 1)
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
    """Return the models whose jobs have waited for so many seconds: `model, jobs, running, moved_at`.

    Running jobs move by commits, queued ones while one of the model runs or has just ended. Jobs of every workspace
    tell if a model moves; those of one are counted. `running`: one of the model's jobs has begun.
    """
    rows = connection.execute(
        text("""
            with active as (
              select j.id, j.workspace_id, j.model_name as model, j.state = 'running' as running,
                     coalesce(j.resumed_at, j.queued_at) as queued_at, greatest(j.started_at, j.resumed_at) as begun_at,
                     row_number() over (partition by j.model_name, j.state order by j.id desc) as place
              from vectormill.jobs j
              where j.state not in ('completed', 'failed', 'cancelled') and j.state in ('queued', 'running')
                and exists (select from vectormill.chunks c
                            where c.job_id between j.id and j.id and c.state in ('pending', 'running')
                            order by c.job_id, c.id limit 1)
            ), by_model as (
              select model, bool_or(running) as running, min(queued_at) as waits_from,
                     count(*) filter (where workspace_id = :workspace or cast(:workspace as bigint) is null) as jobs,
                     max(greatest(begun_at, case when running and place <= :most then (
                       select u.created_at from vectormill.usage u where u.job_id = active.id
                       order by u.created_at desc limit 1) end)) filter (where running) as committed_at
              from active group by model
            ), moved as (
              select model, jobs, running, case when running then committed_at else greatest(waits_from, (
                       select max(j.finished_at) from vectormill.jobs j
                       where j.finished_at > now() - make_interval(secs => :age) and j.model_name = by_model.model)) end
                     as moved_at
              from by_model
            )
            select * from moved where moved_at < now() - make_interval(secs => :age) and jobs > 0 order by model
        """),
        {"workspace": workspace_id, "age": seconds, "most": _MOST_RUNNING},
    )
    return list(rows.mappings())


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Failures of the last day, among the newest `NEWEST_ENDED` jobs that ended in it."""

    #: Failed jobs, those first that no later job of the name made good, then the newest:
    #: `id, name, reason, message, finished_at, mended`.
    jobs: list[RowMapping]
    #: Number of all failed jobs.
    failed: int
    #: Rejects of these jobs, and of those that haven't ended.
    rejected: int
    #: More jobs ended than were looked at.
    is_cut: bool


def failures_today(connection: Connection, workspace_id: int | None, limit: int) -> Failures:
    """Return the failures of the last day, with up to `limit` jobs."""
    rows = connection.execute(
        text("""
            with ended as (
              select id, workspace_id, name, state, reason, message, finished_at, receipt from vectormill.jobs
              where finished_at > now() - interval '1 day' and state in ('completed', 'failed', 'cancelled')
                and (workspace_id = :workspace or cast(:workspace as bigint) is null)
              order by finished_at desc limit :newest
            ), counted as (
              select count(*) as ended, count(*) filter (where state = 'failed') as failed,
                     coalesce(sum((receipt->'items'->>'rejected')::bigint), 0)::bigint + (
                       select coalesce(sum((progress->'items'->>'rejected')::bigint), 0)::bigint from vectormill.jobs j
                       where j.state not in ('completed', 'failed', 'cancelled')
                         and (j.workspace_id = :workspace or cast(:workspace as bigint) is null)
                     ) as rejected
              from ended
            ), failed_names as (
              -- Each name once, since many jobs of one may have failed.
              select distinct on (workspace_id, name) workspace_id, name, id as first
              from ended where state = 'failed' order by workspace_id, name, id
            ), mended as (
              select n.workspace_id, n.name, (
                select j.id from vectormill.jobs j
                where j.name = n.name and j.id > n.first and j.workspace_id = n.workspace_id and j.state = 'completed'
                order by j.id desc limit 1) as by_job
              from failed_names n
            ), shown as (
              select e.id, e.name, e.reason, e.message, e.finished_at, coalesce(e.id < m.by_job, false) as mended
              from ended e join mended m using (workspace_id, name)
              where e.state = 'failed' order by mended, e.finished_at desc limit :limit
            )
            select counted.ended, counted.failed, counted.rejected, shown.*
            from counted left join shown on true order by shown.mended, shown.finished_at desc
        """),
        {"workspace": workspace_id, "newest": NEWEST_ENDED, "limit": limit},
    )
    found = list(rows.mappings())
    return Failures(
        jobs=[row for row in found if row["id"] is not None],
        failed=found[0]["failed"],
        rejected=found[0]["rejected"],
        is_cut=found[0]["ended"] == NEWEST_ENDED,
    )


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
        return stale_seconds(self.expect_every, self.synced_at or self.created_at)


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


def tokens_of_hour(connection: Connection, workspace_id: int | None, hour: datetime) -> int:
    """Return the tokens of jobs and requests in the hour that begins then."""
    rows = connection.execute(
        # By workspace, to read the index alone.
        text("""
            select coalesce(sum(u.tokens), 0)::bigint
            from vectormill.workspaces w cross join lateral (
              select sum(total_tokens) as tokens from vectormill.usage
              where workspace_id = w.id and created_at >= :hour and created_at < :hour + interval '1 hour'
            ) u
            where w.id = :workspace or cast(:workspace as bigint) is null
        """),
        {"workspace": workspace_id, "hour": hour},
    )
    return int(rows.scalar_one())
