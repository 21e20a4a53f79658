"""Batch requests: rows and states. An update applies only while the batch request is in a state that allows it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from pipeline.core.requests import BatchState
from pipeline.db.tables import batches

#: Counts of a batch request that ends without a job.
_NOTHING = dict.fromkeys(("total", "completed", "failed", "input_tokens", "cached_tokens"), 0)


def insert(connection: Connection, batch: Mapping[str, Any], window_seconds: float) -> RowMapping:
    """Insert a batch request, to be validated. Return its row."""
    expires_at = text("now() + make_interval(secs => :window)").bindparams(window=window_seconds)
    made = batches.insert().values(**batch, expires_at=expires_at).returning(batches)
    return connection.execute(made).mappings().one()


def find(connection: Connection, workspace_id: int, batch_id: str) -> RowMapping | None:
    """Return a workspace's batch request; None if there is none."""
    found = batches.select().where(batches.c.id == batch_id, batches.c.workspace_id == workspace_id)
    return connection.execute(found).mappings().one_or_none()


def by_id(connection: Connection, batch_id: str) -> RowMapping | None:
    """Return a batch request of any workspace; None if there is none."""
    return connection.execute(batches.select().where(batches.c.id == batch_id)).mappings().one_or_none()


def lock(connection: Connection, batch_id: str) -> RowMapping | None:
    """Lock a batch request's row and return it. Lock order: the batch request first, then its job."""
    return (
        connection.execute(batches.select().where(batches.c.id == batch_id).with_for_update()).mappings().one_or_none()
    )


def page(connection: Connection, workspace_id: int, after: str | None, limit: int) -> Sequence[RowMapping]:
    """Return a page of a workspace's batch requests, newest first, past the cursor `after`."""
    found = batches.select().where(batches.c.workspace_id == workspace_id)
    if after is not None:
        found = found.where(batches.c.id < after)
    return connection.execute(found.order_by(batches.c.id.desc()).limit(limit)).mappings().all()


def to_stage(connection: Connection, limit: int) -> list[str]:
    """Return the ids of batch requests that wait to become jobs."""
    rows = connection.execute(
        text("""
            select id from vectormill.batches
            where ended_at is null and state = 'validating' and ends_as is null order by id limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def to_end(connection: Connection, limit: int) -> list[str]:
    """Return the ids of batch requests that are due to end: their job has ended or is gone, or they were cancelled or
    expired before it began, or while another batch request goes on with it. This includes requests whose job was
    retried while they were `finalizing`."""
    rows = connection.execute(
        text("""
            select b.id from vectormill.batches b left join vectormill.jobs j on j.id = b.job_id
            where b.ended_at is null
              and case when b.job_id is null then b.ends_as is not null
                       else j.id is null or j.state in ('completed', 'failed', 'cancelled')
                            or b.state = 'finalizing' or (b.ends_as is not null and exists
                                (select 1 from vectormill.batches o
                                 where o.ended_at is null and o.job_id = b.job_id and o.ends_as is null)) end
            order by b.id limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def to_expire(connection: Connection, limit: int) -> list[str]:
    """Return the ids of batch requests whose completion window has passed."""
    rows = connection.execute(
        text("""
            select id from vectormill.batches
            where ended_at is null and ends_as is null and state <> 'finalizing' and expires_at < now()
            order by id limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def begin(connection: Connection, batch_id: str, job_id: UUID, model: str) -> bool:
    """Attach a batch request to its job, new or existing. Return False if it has a job already, or is ending."""
    return (
        connection.execute(
            text("""
                update vectormill.batches
                set job_id = :job, model = :model, in_progress_at = now(), state = 'in_progress'
                where id = :batch and job_id is null and ended_at is null and ends_as is null
            """),
            {"batch": batch_id, "job": job_id, "model": model},
        ).rowcount
        == 1
    )


def let_go(connection: Connection, batch_id: str, ends_as: BatchState) -> bool:
    """Mark a batch request to end before its job, as `CANCELLED` or `EXPIRED`. Return False if it was ending."""
    return (
        connection.execute(
            text("""
                update vectormill.batches
                set ends_as = :ends_as,
                    state = case when :ends_as = 'cancelled' then 'cancelling' else state end,
                    cancelling_at = case when :ends_as = 'cancelled' then now() end
                where id = :batch and ended_at is null and ends_as is null
            """),
            {"batch": batch_id, "ends_as": ends_as.value},
        ).rowcount
        > 0
    )


def goes_on_for_others(connection: Connection, job_id: UUID) -> bool:
    """Return True if a batch request still waits for the job."""
    return bool(
        connection.execute(
            text("""
                select exists (select 1 from vectormill.batches
                               where ended_at is null and job_id = :job and ends_as is null)
            """),
            {"job": job_id},
        ).scalar_one()
    )


def begin_finalizing(connection: Connection, batch_id: str) -> None:
    """Mark a batch request as `finalizing`, while its files are written."""
    connection.execute(
        text("""
            update vectormill.batches set finalizing_at = coalesce(finalizing_at, now()),
                   state = case when state = 'in_progress' then 'finalizing' else state end
            where id = :batch and ended_at is null
        """),
        {"batch": batch_id},
    )


def wait_again(connection: Connection, batch_id: str) -> None:
    """Move a batch request back to in_progress: its job runs again, and its files aren't written yet."""
    connection.execute(
        text("""
            update vectormill.batches set state = 'in_progress', finalizing_at = null
            where id = :batch and state = 'finalizing' and ended_at is null and ends_as is null
        """),
        {"batch": batch_id},
    )


def end(
    connection: Connection,
    batch_id: str,
    state: BatchState,
    *,
    output_file_id: str | None = None,
    error_file_id: str | None = None,
    errors: Sequence[Mapping[str, Any]] = (),
    counts: Mapping[str, int] | None = None,
) -> bool:
    """End a batch request. Return False if it had ended."""
    return (
        connection.execute(
            text("""
                update vectormill.batches
                set state = :state, ended_at = now(), output_file_id = :output, error_file_id = :error,
                    errors = cast(:errors as jsonb), counts = cast(:counts as jsonb)
                where id = :batch and ended_at is null
            """),
            {
                "batch": batch_id,
                "state": state.value,
                "output": output_file_id,
                "error": error_file_id,
                "errors": json.dumps(list(errors)) if errors else None,
                "counts": json.dumps(dict(counts or _NOTHING)),
            },
        ).rowcount
        > 0
    )
