"""Completion of jobs: a job without open chunks ends, and its receipt is frozen."""

from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.job_status import AccountedItems
from pipeline.core.jobs import Job, JobState, Reason
from pipeline.db import chunks, jobs, outputs, rejects
from pipeline.infra import metrics
from pipeline.jobs import control, status
from pipeline.webhooks.events import job_ended

log = structlog.get_logger()


def would_complete(connection: Connection, job: Job) -> bool:
    """Return True if a job has no open chunk and would end as completed."""
    if job.state.ended or chunks.has_open(connection, job.id):
        return False
    return control.outcome(job, status.current_account(connection, job.id))[0] is JobState.COMPLETED


def end(engine: Engine, job_id: UUID, *, finalized: str | None = None) -> None:
    """End a job if it has no open chunk.

    A job whose sink finalises only ends as completed once that is done: `finalized` is the digest of the parts at that
    time, since a retry may have added more.
    """
    with engine.begin() as connection:
        # A long end elsewhere must not hold the leader up.
        job = jobs.lock_if_free(connection, job_id)
        if job is None or job.state.ended or chunks.has_open(connection, job_id):
            return
        finalizes = sink_of(job.options).finalizes
        if finalizes and finalized is None and job.state is not JobState.PAUSED:
            return  # the background task ends it; otherwise its chunks would be summed up four times a second
        account = status.current_account(connection, job_id)
        state, reason, message = control.outcome(job, account)
        if state is JobState.COMPLETED and finalizes and finalized != outputs.digest(connection, job_id):
            return
        if state is JobState.COMPLETED:
            if refusal := sink_of(job.options).conclude(connection, job):
                state, reason, message = JobState.FAILED, Reason.ITEMS_UNACCOUNTED, refusal
            account = status.current_account(connection, job_id)
        jobs.end(connection, job_id, state, account.model_dump(by_alias=True), reason=reason, message=message)
        now = status.sum_up(connection, job_id)
        jobs.save_progress(connection, job_id, now.model_dump(mode="json"), final=True)
        job_ended(connection, job, state, account, reason=reason, message=message)
    _count(engine, job_id, state, account.items)
    counts = account.items.model_dump(by_alias=True)
    log.info("job_ended", job=str(job_id), state=state.value, reason=reason, items=counts)


def _count(engine: Engine, job_id: UUID, state: JobState, counts: AccountedItems) -> None:
    metrics.DISPATCHER_JOBS_ENDED.labels(state).inc()
    for outcome in ("embedded", "reused", "rejected", "cancelled"):
        metrics.DISPATCHER_ITEMS.labels(outcome).inc(getattr(counts, outcome))
    if counts.rejected:
        with engine.begin() as connection:
            by_code = rejects.count_by_code(connection, job_id)
        for code, times in by_code.items():
            metrics.DISPATCHER_REJECTS.labels(code).inc(times)
