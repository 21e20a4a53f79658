"""Jobs: rows, states and transitions. An update applies only while the job is in a state that allows it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, RowMapping, func, select, text

from pipeline.core.jobs import JOB_TRANSITIONS, ActiveJob, Job, JobState, Reason
from pipeline.core.options import KeptOptions
from pipeline.db.tables import jobs, workspaces


def _as_job(row: RowMapping) -> Job:
    same = {each.name: row[each.name] for each in fields(Job) if each.name in row}
    made = {
        "model": row["model_name"],
        "state": JobState(row["state"]),
        "ends_as": JobState(row["ends_as"]) if row["ends_as"] else None,
        "options": KeptOptions.from_json(row["options"]),
    }
    return Job(**{**same, **made})


def by_id(connection: Connection, job_id: UUID) -> Job | None:
    """Return a job; None if there is none."""
    row = connection.execute(jobs.select().where(jobs.c.id == job_id)).mappings().one_or_none()
    return _as_job(row) if row else None


def vector_space(connection: Connection, job_id: UUID) -> RowMapping:
    """Return the vector space of a job."""
    return (
        connection.execute(
            text("""
            select s.* from vectormill.jobs j join vectormill.vector_spaces s on s.id = j.vector_space_id
            where j.id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one()
    )


def by_idempotency_key(connection: Connection, workspace_id: int, key: str) -> tuple[Job, bool] | None:
    """Return the job submitted with this idempotency key, and True if its staging is dead, since its producer's lease
    has expired."""
    row = (
        connection.execute(
            text("""
            select *, state = 'staging' and lease_until < clock_timestamp() as staging_is_dead
            from vectormill.jobs where workspace_id = :workspace and idempotency_key = :key
        """),
            {"workspace": workspace_id, "key": key},
        )
        .mappings()
        .one_or_none()
    )
    return (_as_job(row), row["staging_is_dead"]) if row else None


def release_key(connection: Connection, job_id: UUID) -> None:
    """Free a job's idempotency key for another job."""
    connection.execute(text("update vectormill.jobs set idempotency_key = null where id = :job"), {"job": job_id})


def workspace_of(connection: Connection, job_id: UUID) -> int:
    """Return the workspace of a job."""
    found = text("select workspace_id from vectormill.jobs where id = :job")
    return int(connection.execute(found, {"job": job_id}).scalar_one())


def named(connection: Connection, workspace_id: int | None, name: str, limit: int) -> list[RowMapping]:
    """Return the newest jobs of this name, in one workspace or in all: `id, state`."""
    rows = connection.execute(
        text("""
            select id, state from vectormill.jobs
            where (workspace_id = :workspace or cast(:workspace as bigint) is null) and name = :name
            order by id desc limit :limit
        """),
        {"workspace": workspace_id, "name": name, "limit": limit},
    )
    return list(rows.mappings())


def page(
    connection: Connection,
    workspace_id: int | None,
    *,
    before: UUID | None = None,
    limit: int,
    **wanted: Any,
) -> list[RowMapping]:
    """Return a page of jobs, newest first, of one workspace or of all: `id, workspace`.

    Args:
        before: the cursor, the job after which the page begins.
        wanted: filters, those of `_fitting`.
    """
    found = select(jobs.c.id, workspaces.c.name.label("workspace")).join(workspaces).order_by(jobs.c.id.desc())
    if before is not None:
        found = found.where(jobs.c.id < before)
    found = found.where(*_fitting(workspace_id, **wanted)).limit(limit)
    return list(connection.execute(found).mappings())


def count(connection: Connection, workspace_id: int | None, **wanted: Any) -> list[tuple[str, str, int]]:
    """Return the number of jobs by state and model, of one workspace or of all: (state, model, count). `wanted`:
    filters, those of `_fitting`."""
    group = (jobs.c.state, jobs.c.model_name)
    counted = select(*group, func.count()).where(*_fitting(workspace_id, **wanted)).group_by(*group)
    rows = connection.execute(counted.order_by(jobs.c.model_name, jobs.c.state))
    return [(row[0], row[1], row[2]) for row in rows]


def _fitting(
    workspace_id: int | None,
    *,
    states: Sequence[JobState] = (),
    model: str | None = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions of optional filters: `name` is a substring; jobs are made from `since` to before `until`."""
    if workspace_id is not None:
        yield jobs.c.workspace_id == workspace_id
    if states:
        yield jobs.c.state.in_(states)
    if model is not None:
        yield jobs.c.model_name == model
    if name is not None:
        yield jobs.c.name.icontains(name, autoescape=True)
    if labels:
        yield jobs.c.labels.contains(dict(labels))
    if since is not None:
        yield jobs.c.created_at >= since
    if until is not None:
        yield jobs.c.created_at < until


def active(connection: Connection) -> list[ActiveJob]:
    """Return the jobs that have been queued and haven't ended, oldest first."""
    rows = connection.execute(
        text("""
            select j.id, j.name, j.state, j.model_name as model, j.workspace_id, j.priority, j.max_rejects, w.weight
            from vectormill.jobs j join vectormill.workspaces w on w.id = j.workspace_id
            where j.state not in ('completed', 'failed', 'cancelled') and j.state <> 'staging'
            order by j.id
        """)
    )
    return [ActiveJob(**{**row, "state": JobState(row["state"])}) for row in rows.mappings()]


def without_open_chunks(connection: Connection) -> list[UUID]:
    """Return the active jobs that have no pending or running chunk."""
    rows = connection.execute(
        # Written like chunks.has_open, for each job, and for the same reason.
        text("""
            select j.id from vectormill.jobs j left join lateral (
              select c.id from vectormill.chunks c
              where c.job_id between j.id and j.id and c.state in ('pending', 'running')
              order by c.job_id, c.id limit 1
            ) open on true
            where j.state not in ('completed', 'failed', 'cancelled') and j.state <> 'staging' and open.id is null
            order by j.id
        """)
    )
    return list(rows.scalars())


def open_by_state(connection: Connection) -> list[RowMapping]:
    """Return the number of jobs that haven't ended, by state, reason and model: `state, reason, model_name, jobs`, and
    `pending, running`, their chunks by the last progress snapshots."""
    return list(
        connection.execute(
            text("""
            select state, reason, model_name, count(*) as jobs,
                   coalesce(sum((progress->'chunks'->>'pending')::int), 0)::int as pending,
                   coalesce(sum((progress->'chunks'->>'running')::int), 0)::int as running
            from vectormill.jobs
            where state not in ('completed', 'failed', 'cancelled')
            group by state, reason, model_name
        """)
        ).mappings()
    )


def move(
    connection: Connection, job_id: UUID, to: JobState, *, reason: Reason | None = None, message: str | None = None
) -> bool:
    """Move a job to `to`, if its state allows that. Return False if it doesn't."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs set state = :to, reason = :reason, message = :message
            where id = :job and state = any(:sources)
        """),
            {"job": job_id, "to": to.value, "reason": reason, "message": message, "sources": sources_of(to)},
        ).rowcount
        == 1
    )


def sources_of(to: JobState) -> list[str]:
    """Return the states from which a job may move to `to`."""
    return [state.value for state, targets in JOB_TRANSITIONS.items() if to in targets]


def resume(connection: Connection, job_id: UUID) -> bool:
    """Resume a paused job. Return False if it isn't paused."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs
            set state = 'queued', reason = null, message = null, resumed_at = clock_timestamp()
            where id = :job and state = 'paused'
        """),
            {"job": job_id},
        ).rowcount
        == 1
    )


def set_priority(connection: Connection, job_id: UUID, priority: int) -> bool:
    """Set the priority of a job that hasn't ended. Return False if it has."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs set priority = :priority
            where id = :job and state not in ('completed', 'failed', 'cancelled')
        """),
            {"job": job_id, "priority": priority},
        ).rowcount
        == 1
    )


def begin_cancelling(
    connection: Connection, job_id: UUID, ends_as: JobState, reason: Reason, message: str | None
) -> bool:
    """Stop a job's pending chunks from being claimed. The job becomes `ends_as` once its running chunks have ended.
    Return False if its state doesn't allow that."""
    moved = move(connection, job_id, JobState.CANCELLING, reason=reason, message=message)
    if moved:
        connection.execute(
            text("update vectormill.jobs set ends_as = :ends_as where id = :job"),
            {"job": job_id, "ends_as": ends_as.value},
        )
    return moved


def end(
    connection: Connection,
    job_id: UUID,
    state: JobState,
    receipt: Mapping[str, Any],
    *,
    reason: str | None,
    message: str | None,
) -> None:
    """End a job and freeze its receipt. The caller has locked the job's row."""
    connection.execute(
        text("""
            update vectormill.jobs
            set state = :state, receipt = cast(:receipt as jsonb), reason = :reason, message = :message,
                finished_at = clock_timestamp(), ends_as = null
            where id = :job
        """),
        {
            "job": job_id,
            "state": state.value,
            "receipt": json.dumps(receipt),
            "reason": reason,
            "message": message,
        },
    )


def lock(connection: Connection, job_id: UUID) -> Job | None:
    """Return a job, and lock its row until the transaction ends."""
    row = connection.execute(jobs.select().where(jobs.c.id == job_id).with_for_update()).mappings().one_or_none()
    return _as_job(row) if row else None


def lock_if_free(connection: Connection, job_id: UUID) -> Job | None:
    """As `lock`, but return None also if another transaction has locked the row."""
    locked = jobs.select().where(jobs.c.id == job_id).with_for_update(skip_locked=True)
    row = connection.execute(locked).mappings().one_or_none()
    return _as_job(row) if row else None


def requeue(connection: Connection, job_id: UUID) -> None:
    """Queue a completed or failed job again, and drop its receipt."""
    connection.execute(
        text("""
            update vectormill.jobs
            set state = 'queued', reason = null, message = null, receipt = null, finished_at = null, ends_as = null,
                resumed_at = clock_timestamp()
            where id = :job and state in ('completed', 'failed')
        """),
        {"job": job_id},
    )


def give_up(connection: Connection, job_id: UUID) -> bool:
    """Rule out retries of a job that has ended, as if its texts were removed. Return False if it hasn't ended, or there
    is none."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs set texts_removed_at = coalesce(texts_removed_at, now())
            where id = :job and state in ('completed', 'failed', 'cancelled')
        """),
            {"job": job_id},
        ).rowcount
        == 1
    )


def delete(connection: Connection, job_id: UUID) -> bool:
    """Delete a job that has ended, with its chunks, inputs and outputs. Return False if it hasn't ended, or there is
    none."""
    return (
        connection.execute(
            text("delete from vectormill.jobs where id = :job and state in ('completed', 'failed', 'cancelled')"),
            {"job": job_id},
        ).rowcount
        == 1
    )


def ids_between(connection: Connection, first_id: UUID, end_id: UUID, limit: int) -> list[UUID]:
    """Return up to `limit` job ids of all workspaces from `first_id` to before `end_id`, in order."""
    rows = connection.execute(
        text("select id from vectormill.jobs where id >= :first and id < :end order by id limit :limit"),
        {"first": first_id, "end": end_id, "limit": limit},
    )
    return list(rows.scalars())


def count_between(connection: Connection, first_id: UUID, end_id: UUID) -> tuple[int, int]:
    """Return the number of jobs of all workspaces with ids from `first_id` to before `end_id`, and of those that
    haven't ended."""
    row = connection.execute(
        text("""
            select count(*), count(*) filter (where state not in ('completed', 'failed', 'cancelled'))
            from vectormill.jobs where id >= :first and id < :end
        """),
        {"first": first_id, "end": end_id},
    ).one()
    return row[0], row[1]


def save_progress(connection: Connection, job_id: UUID, progress: Mapping[str, Any], *, final: bool = False) -> None:
    """Save a job's recomputed progress snapshot, for status pages. Only the `final` one is saved once it has ended: any
    other was computed before."""
    connection.execute(
        text("""
            update vectormill.jobs
            set progress = cast(:progress as jsonb) || jsonb_build_object('as_of', clock_timestamp())
            where id = :job and (:final or state not in ('completed', 'failed', 'cancelled'))
        """),
        {"job": job_id, "progress": json.dumps(progress), "final": final},
    )


def flush(connection: Connection, job_id: UUID) -> None:
    """Write to the job's row, so that this transaction's synchronous commit flushes all commits before it to disk
    too."""
    connection.execute(text("update vectormill.jobs set progress = progress where id = :job"), {"job": job_id})


def fresh_progress(connection: Connection, job_id: UUID, seconds: float) -> dict[str, Any] | None:
    """Return a job's progress snapshot, if it is at most `seconds` old or was taken when or after the job ended."""
    found = connection.execute(
        text("""
            select progress - 'as_of' from vectormill.jobs
            where id = :job
              and ((progress->>'as_of')::timestamptz > now() - make_interval(secs => :seconds)
                   or (receipt is not null and (progress->>'as_of')::timestamptz >= finished_at))
        """),
        {"job": job_id, "seconds": seconds},
    ).scalar_one_or_none()
    return dict(found) if found else None


def running_of_model(connection: Connection, model: str) -> list[UUID]:
    """Return the queued and running jobs of a model."""
    rows = connection.execute(
        text("select id from vectormill.jobs where model_name = :model and state in ('queued', 'running')"),
        {"model": model},
    )
    return [row[0] for row in rows]


def has_begun(connection: Connection, job_id: UUID) -> bool:
    """Return True if any of the job's chunks was ever claimed."""
    query = text("select started_at is not null from vectormill.jobs where id = :job")
    return connection.execute(query, {"job": job_id}).scalar_one()


def take_old_texts(connection: Connection, older_than_days: float, limit: int) -> tuple[UUID, int] | None:
    """Take the next range of item texts past retention, `limit` items long, and return (job, first index). From its
    first range on, the job counts as one whose texts are removed. Return None if no text is due."""
    row = connection.execute(
        text("""
            update vectormill.jobs j
            set texts_removed_at = coalesce(texts_removed_at, now()), texts_kept_from = texts_kept_from + :limit
            where id = (select id from vectormill.jobs
                        where texts_kept_from < items_total
                          and finished_at < now() - make_interval(secs => 86400 * cast(:days as float8))
                        order by finished_at limit 1 for update skip locked)
            returning id, texts_kept_from - :limit
        """),
        {"days": older_than_days, "limit": limit},
    ).one_or_none()
    return (row[0], row[1]) if row else None
