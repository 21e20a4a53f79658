"""Lost claims: their chunks are given back, and their losses counted against a worker, a model or a text."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.chunks import Claim

_EXPIRED, _STOPPED = "lease expired", "model stopped"

_LOSE = """
    with lost as (
      update vectormill.chunks c
      set state = 'pending', lease_until = null, crashes = c.crashes + 1, isolation = c.isolation + 1,
          last_error = :cause
      from ({which}) as which
      where c.id = which.id
      returning c.id, c.job_id, c.fence, c.worker_id, c.task_id
    )
    insert into vectormill.claim_losses (model, job_id, chunk_id, fence, worker_id, task_id, cause)
    select j.model_name, l.job_id, l.id, l.fence, l.worker_id, l.task_id, :cause
    from lost l join vectormill.jobs j on j.id = l.job_id
    returning chunk_id
"""


def expire_leases(connection: Connection, limit: int) -> list[int]:
    """Give back chunks whose lease has expired, and return their ids. A chunk that a backend still locks is skipped."""
    rows = connection.execute(
        text(
            _LOSE.format(
                which="""
            select id from vectormill.chunks where state = 'running' and lease_until < now()
            order by lease_until limit :limit for update skip locked"""
            )
        ),
        {"limit": limit, "cause": _EXPIRED},
    )
    return [row[0] for row in rows]


def free_lost_claim(connection: Connection, chunk_id: int, worker_id: UUID, task_id: str, cause: str) -> bool:
    """Give back the chunk of a child process that died, before its lease expires. Return False if nothing was
    claimed."""
    rows = connection.execute(
        text(
            _LOSE.format(
                which="""
            select id from vectormill.chunks
            where id = :chunk and state = 'running' and worker_id = :worker and task_id = :task for update"""
            )
        ),
        {"chunk": chunk_id, "worker": worker_id, "task": task_id, "cause": cause},
    )
    return rows.first() is not None


def pending(connection: Connection, limit: int) -> Sequence[tuple[UUID, int, bool]]:
    """Return claimable chunks of runnable jobs whose last claim was lost: (job id, chunk id, suspect). A chunk is
    suspect if the process of its last claim died, after earlier losses, so that one of its texts may be the cause."""
    rows = connection.execute(
        text("""
            select c.job_id, c.id, c.isolation > 1 and c.last_error is distinct from :expired
            from vectormill.chunks c join vectormill.jobs j on j.id = c.job_id
            where c.state = 'pending' and c.crashes > 0 and (c.not_before is null or c.not_before <= now())
              and j.state in ('queued', 'running')
            order by c.id limit :limit
        """),
        {"limit": limit, "expired": _EXPIRED},
    )
    return [(row[0], row[1], row[2]) for row in rows]


def note_death_before_claim(connection: Connection, chunk_id: int, worker_id: UUID, task_id: str, cause: str) -> None:
    """Record a process's death against its worker and model, if its task never claimed the chunk and the chunk still
    waits: it died while it loaded the model. Such a loss has fence 0."""
    connection.execute(
        text("""
            insert into vectormill.claim_losses (model, job_id, chunk_id, fence, worker_id, task_id, cause)
            select j.model_name, c.job_id, c.id, 0, :worker, :task, :cause
            from vectormill.chunks c join vectormill.jobs j on j.id = c.job_id
            where c.id = :chunk and c.state = 'pending' and c.task_id is distinct from :task
              and not exists (select from vectormill.claim_losses l
                              where l.model = j.model_name and l.chunk_id = c.id and l.task_id = :task)
        """),
        {"chunk": chunk_id, "worker": worker_id, "task": task_id, "cause": cause},
    )


def note_stop(connection: Connection, claim: Claim) -> None:
    """Record that the model stopped working under a claim, against its worker and model. If that has happened to the
    chunk before, with nothing committed since, a text may be the cause, so it also counts as a crash."""
    connection.execute(
        text("""
            with mine as (
              select c.id, c.job_id, c.fence, c.worker_id, c.task_id, j.model_name as model,
                     exists (select from vectormill.claim_losses l
                             where l.model = j.model_name and l.chunk_id = c.id and l.cause = :cause
                               and l.lost_at > coalesce((select max(u.created_at) from vectormill.usage u
                                                         where u.chunk_id = c.id), '-infinity')) as again
              from vectormill.chunks c join vectormill.jobs j on j.id = c.job_id
              where c.id = :chunk and c.fence = :fence and c.token = :token and c.state = 'running' for update of c
            ), blamed as (
              update vectormill.chunks c set crashes = c.crashes + 1, isolation = c.isolation + 1
              from mine where c.id = mine.id and mine.again
            )
            insert into vectormill.claim_losses (model, job_id, chunk_id, fence, worker_id, task_id, cause)
            select model, job_id, id, fence, worker_id, task_id, :cause from mine
        """),
        {"chunk": claim.chunk_id, "fence": claim.fence, "token": claim.token, "cause": _STOPPED},
    )


def terminate_frozen_backends(connection: Connection, lease_seconds: float) -> list[int]:
    """Terminate the backends of claims whose lease expired a whole lease ago, if their transaction began before then:
    their worker froze while it was writing, and no Postgres timeout ends that. The backend's application name says for
    which claim it writes, since after a failover a pid of the old server may be another process. Return the chunks'
    ids."""
    rows = connection.execute(
        text("""
            select pg_terminate_backend(a.pid), c.id
            from vectormill.chunks c join pg_stat_activity a on a.pid = c.backend_pid
            where c.state = 'running' and c.lease_until < now() - make_interval(secs => :lease)
              and a.application_name = 'vectormill-worker ' || replace(c.token::text, '-', '')
              and a.datname = current_database()
              and a.backend_start < c.lease_until and a.xact_start < now() - make_interval(secs => :lease)
        """),
        {"lease": lease_seconds},
    )
    return [chunk_id for _, chunk_id in rows]


def of_models(connection: Connection, window_seconds: float) -> dict[str, tuple[int, int, int]]:
    """Return, for each model that lost a claim within the window and since its oldest job was queued or resumed: claims
    lost before they had committed anything, distinct chunks that lost one so, and claims that committed something.

    A machine or a cable takes all its claims with it when it fails, which says nothing about the model. So the first
    expired lease of each chunk isn't counted.
    """
    rows = connection.execute(
        text("""
            with since as (
              select model_name as model,
                     greatest(now() - make_interval(secs => :window), min(coalesce(resumed_at, queued_at))) as moment
              from vectormill.jobs where state in ('queued', 'running') group by model_name
            ), every as (
              select l.model, s.moment, l.chunk_id, l.fence, l.id, l.cause = :expired and
                     row_number() over (partition by l.model, l.chunk_id, l.cause order by l.id) = 1 as excused
              from vectormill.claim_losses l join since s on s.model = l.model and l.lost_at > s.moment
            ), lost as (
              -- No text is at fault for a loss before the claim, so each of them tells as much as another chunk's.
              select model, moment, count(*) as claims,
                     count(distinct (chunk_id, case when fence = 0 then id end)) as chunks
              from every e
              where not excused and not exists (select from vectormill.usage u
                                                where u.chunk_id = e.chunk_id and u.fence = e.fence)
              group by model, moment
            )
            select l.model, l.claims, l.chunks,
                   (select count(distinct (u.chunk_id, u.fence)) from vectormill.usage u
                    where u.model = l.model and u.created_at > l.moment and u.chunk_id is not null)
            from lost l
        """),
        {"window": window_seconds, "expired": _EXPIRED},
    )
    return {model: (claims, chunk_count, commits) for model, claims, chunk_count, commits in rows}


def of_worker(connection: Connection, worker_id: UUID) -> int:
    """Return the number of distinct chunks that a worker has lost since its last commit, within the last hour. Each
    loss before a claim counts by itself."""
    return connection.execute(
        text("""
            with lost as (
              select * from vectormill.claim_losses
              where worker_id = :worker and lost_at > now() - interval '1 hour'
            )
            select count(distinct (chunk_id, case when fence = 0 then id end)) from lost
            where lost_at > coalesce(
              (select max(u.created_at) from vectormill.usage u
               join vectormill.chunks c on c.id = u.chunk_id and c.worker_id = :worker
               -- Per model, to use the index.
               where u.model in (select model from lost) and u.created_at > now() - interval '1 hour'), '-infinity')
        """),
        {"worker": worker_id},
    ).scalar_one()
