"""History of jobs: who submitted each one, and the changes of its state and priority since."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def read(connection: Connection, job_id: UUID, limit: int) -> list[RowMapping]:
    """Return a job's first entry and the newest others, `limit` in all, in order: `number` from 1, `changed_at, state,
    reason, message, priority, submitted_by, query`."""
    rows = connection.execute(
        text("""
            select number, changed_at, state, reason, message, priority, submitted_by, query from (
              select *, row_number() over (order by id) as number, count(*) over () as entries
              from vectormill.job_history where job_id = :job
            ) numbered
            where number = 1 or number > entries - :limit + 1 order by number
        """),
        {"job": job_id, "limit": limit},
    )
    return list(rows.mappings())


def lost_claims(connection: Connection, job_id: UUID, model: str, since: datetime, limit: int) -> list[RowMapping]:
    """Return the newest minutes in which a job lost claims, in order: `lost_at` of the last one, `cause, claims`."""
    rows = connection.execute(
        # By the index of the model's losses, which has their time.
        text("""
            select * from (
              select max(lost_at) as lost_at, cause, count(*) as claims from vectormill.claim_losses
              where model = :model and lost_at >= :since and job_id = :job
              group by date_trunc('minute', lost_at), cause order by lost_at desc limit :limit
            ) newest order by lost_at
        """),
        {"job": job_id, "model": model, "since": since, "limit": limit},
    )
    return list(rows.mappings())
