"""Job requests made in SQL: the rows that the functions `vectormill.submit` and `vectormill.sync` write (migration
0022).

Options are read as text, since JSON in Postgres may hold numbers that no parser here reads.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from pipeline.core.requests import RequestReason
from pipeline.db.tables import requests

# One statement for both: between two, a request's job may appear, or go since its query was refused, and it would be
# found twice or not at all.
_WITH_JOBS = """
    select id, state from (
        select id, workspace_id, name, state from vectormill.jobs
        union all
        select job_id, workspace_id, coalesce(name, 'query'), state from vectormill.requests r
        where state <> 'submitted' and not exists (select from vectormill.jobs j where j.id = r.job_id)
    ) found
    where (workspace_id = :workspace or cast(:workspace as bigint) is null) and {CONDITION}
    order by id desc limit :limit
"""


def due(connection: Connection, limit: int) -> Sequence[UUID]:
    """Return the requests that aren't jobs yet, oldest first, by the ids that their jobs will have."""
    rows = connection.execute(
        text("""
            select job_id from vectormill.requests where state = 'requested' order by requested_at limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def read(connection: Connection, job_id: UUID) -> RowMapping | None:
    """Return a request's row; None if there is none."""
    return (
        connection.execute(
            text("""
            select job_id, workspace_id, requested_by, query, model, collection, name, text_column, key_column,
                   options::text as options, idempotency_key, state
            from vectormill.requests where job_id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one_or_none()
    )


def status(connection: Connection, job_id: UUID) -> RowMapping | None:
    """Return the status of a request, or of the job made from it, as `vectormill.job_status` shows it."""
    return (
        connection.execute(
            text("""
            select id, name, state, reason, message, model, created_at, started_at, finished_at
            from vectormill.job_status where id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one_or_none()
    )


def named_with_jobs(connection: Connection, workspace_id: int | None, name: str, limit: int) -> list[RowMapping]:
    """Return the newest jobs, and requests without a job, of this name, in one workspace or in all: `id, state`."""
    values = {"workspace": workspace_id, "sought": name, "limit": limit}
    return list(connection.execute(text(_WITH_JOBS.format(CONDITION="name = :sought")), values).mappings())


def ids_beginning(connection: Connection, workspace_id: int | None, beginning: str, limit: int) -> list[UUID]:
    """Return the ids that begin with `beginning`, newest first, in one workspace or in all, of jobs and of requests
    without a job."""
    values = {"workspace": workspace_id, "sought": beginning, "limit": limit}
    return list(
        connection.execute(text(_WITH_JOBS.format(CONDITION="starts_with(id::text, :sought)")), values).scalars()
    )


def end_submitted(connection: Connection, job_id: UUID) -> bool:
    """Mark a request as submitted, once its job is queued. Return False if it no longer waits, or has no queued job."""
    return (
        connection.execute(
            text("""
            update vectormill.requests r set state = 'submitted', message = null, finished_at = clock_timestamp()
            where job_id = :job and state = 'requested'
              and exists (select from vectormill.jobs j where j.id = r.job_id and j.state <> 'staging')
        """),
            {"job": job_id},
        ).rowcount
        == 1
    )


def end_failed(connection: Connection, job_id: UUID, reason: RequestReason, message: str) -> bool:
    """Fail a request that can't become a job as it is. Return False if it no longer waits, or somebody else is making a
    job of it."""
    return (
        connection.execute(
            text("""
            update vectormill.requests
            set state = 'failed', reason = :reason, message = :message, finished_at = clock_timestamp()
            where job_id = :job and state = 'requested'
              and not exists (select from vectormill.jobs where id = :job and state <> 'failed')
        """),
            {"job": job_id, "reason": reason, "message": message},
        ).rowcount
        == 1
    )


def cancel(connection: Connection, job_id: UUID, reason: str, message: str) -> RowMapping | None:
    """Cancel a waiting request. The caller has locked its job's row, if there is one. Return the request, or None if it
    no longer waits."""
    return (
        connection.execute(
            text("""
            update vectormill.requests
            set state = 'cancelled', reason = :reason, message = :message, finished_at = clock_timestamp()
            where job_id = :job and state = 'requested'
            returning job_id, workspace_id, model, name, options::text as options
        """),
            {"job": job_id, "reason": reason, "message": message},
        )
        .mappings()
        .one_or_none()
    )


def note_unreachable(connection: Connection, job_id: UUID, message: str, *, anew: bool) -> float:
    """Record why a request still waits. Return the seconds for which its database has been unreachable; `anew`: it was
    reached just now, so counting starts again."""
    row = connection.execute(
        text("""
            update vectormill.requests
            set message = :message,
                unreachable_since = coalesce(case when not :anew then unreachable_since end, clock_timestamp())
            where job_id = :job and state = 'requested'
            returning extract(epoch from clock_timestamp() - unreachable_since)::float8
        """),
        {"job": job_id, "message": message, "anew": anew},
    ).one_or_none()
    return row[0] if row else 0.0


def forget_queries(connection: Connection, days: float) -> None:
    """Erase the queries, which may hold texts, of requests that ended, as did their jobs, more than `days` ago, and
    those that jobs' histories have. The queries' hashes stay."""
    connection.execute(
        text("""
            update vectormill.requests r set query = null
            where query is not null and state <> 'requested'
              and finished_at < now() - make_interval(secs => 86400 * :days)
              and not exists (select from vectormill.jobs j
                              where j.id = r.job_id and (j.finished_at < now() - make_interval(secs => 86400 * :days))
                                    is not true)
        """),
        {"days": days},
    )
    connection.execute(
        text("""
            update vectormill.job_history h set query = null from vectormill.jobs j
            where h.query is not null and j.id = h.job_id
              and j.finished_at < now() - make_interval(secs => 86400 * :days)
        """),
        {"days": days},
    )


def delete(connection: Connection, job_id: UUID) -> None:
    """Delete the request that a job came from, if it came from one."""
    connection.execute(requests.delete().where(requests.c.job_id == job_id))


def delete_between(connection: Connection, first_id: UUID, end_id: UUID) -> None:
    """Delete the requests that have ended, with ids from `first_id` to before `end_id`."""
    connection.execute(
        requests.delete().where(
            requests.c.job_id >= first_id, requests.c.job_id < end_id, requests.c.state != "requested"
        )
    )
