"""Jobs that are asked for in SQL: the rows that the function `vectormill.submit` writes (migrations 0008)."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from pipeline.jobs import RequestReason
from pipeline.tables import requests


def due(connection: Connection, limit: int) -> Sequence[UUID]:
    """Requests that are no job yet, by the ids that their jobs will have, the oldest first."""
    rows = connection.execute(
        text("""
            select job_id from vectormill.requests where state = 'requested' order by requested_at limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def read(connection: Connection, job_id: UUID) -> RowMapping | None:
    """A request's row, with `waits_seconds`: how long ago it was made, or made again."""
    return (
        connection.execute(
            text("""
            select *, extract(epoch from clock_timestamp() - requested_at)::float8 as waits_seconds
            from vectormill.requests where job_id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one_or_none()
    )


def end_submitted(connection: Connection, job_id: UUID) -> None:
    """The request is a job by now, which the database has queued."""
    connection.execute(
        text("""
            update vectormill.requests r set state = 'submitted', message = null, finished_at = clock_timestamp()
            where job_id = :job and state = 'requested'
              and exists (select from vectormill.jobs j where j.id = r.job_id and j.state <> 'staging')
        """),
        {"job": job_id},
    )


def end_failed(connection: Connection, job_id: UUID, reason: RequestReason, message: str) -> bool:
    """The request can't be a job as it is. False: it isn't waiting any more, or
    somebody else is making a job of it."""
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


def note(connection: Connection, job_id: UUID, message: str) -> None:
    """Say why a request still waits."""
    connection.execute(
        text("update vectormill.requests set message = :message where job_id = :job and state = 'requested'"),
        {"job": job_id, "message": message},
    )


def delete(connection: Connection, job_id: UUID) -> None:
    """Forget the request that a job came from, if it came from one."""
    connection.execute(requests.delete().where(requests.c.job_id == job_id))


def delete_between(connection: Connection, first_id: UUID, end_id: UUID) -> None:
    """Forget requests that have ended, from `first_id` to before `end_id`."""
    connection.execute(
        requests.delete().where(
            requests.c.job_id >= first_id, requests.c.job_id < end_id, requests.c.state != "requested"
        )
    )
