"""Maintenance by the leader: expired leases, cancelled jobs, progress, failing models, old data.

Each public function is a duty, which is repeated.
"""

import time

import structlog
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from pipeline.core.jobs import ActiveJob, JobState, Reason
from pipeline.db import (
    chunks,
    collection_versions,
    events,
    items,
    jobs,
    lost_claims,
    models,
    partitions,
    sql_requests,
    usage,
    workers,
)
from pipeline.dispatch.state import Dispatcher
from pipeline.infra import metrics
from pipeline.jobs import control, status

log = structlog.get_logger()

_DRAIN_LIMIT = 5_000
_REMOVE_LIMIT = 20_000
_SNAPSHOT_FACTOR = 20
#: Time limit of a duty's turn; the rest is left for its next turn.
_LONGEST_DUTY_SECONDS = 0.5
#: Numbers of different lost chunks, or of lost claims of few chunks, beyond what texts that kill their process explain.
_BROKEN_CHUNKS = 3
_BROKEN_CLAIMS = 15
_EVENT_DAYS = 30
_LITTLE_PATIENCE = text("set local lock_timeout = '200ms'")


def sweep(dispatcher: Dispatcher) -> None:
    """Make chunks with an expired lease pending again, and terminate backends that froze while they held a chunk."""
    with dispatcher.engine.begin() as connection:
        # Workers couldn't renew while the database was away: all of them get one whole lease to come back.
        connection.execute(text("set local lock_timeout = '2s'"))
        uptime = workers.server_age_seconds(connection)
        dispatcher.note_contact()
        if time.monotonic() < dispatcher.sweep_from or uptime < dispatcher.lease_seconds:
            return
        expired = lost_claims.expire_leases(connection, 500)
    if expired:
        metrics.DISPATCHER_LEASES_EXPIRED.inc(len(expired))
        log.warning("leases_expired", chunks=expired)
    with dispatcher.engine.begin() as connection:
        ended = lost_claims.terminate_frozen_backends(connection, dispatcher.lease_seconds)
    if ended:
        metrics.DISPATCHER_BACKENDS_ENDED.inc(len(ended))
        log.warning("frozen_backends_terminated", chunks=ended)


def drain(dispatcher: Dispatcher) -> None:
    """Cancel pending chunks of jobs that are being cancelled, in bounded transactions."""
    with dispatcher.engine.connect() as connection:
        cancelling = [job.id for job in jobs.active(connection) if job.state is JobState.CANCELLING]
    dispatcher.drained = {job_id: dispatcher.drained.get(job_id, 0) for job_id in cancelling}
    enough = time.monotonic() + _LONGEST_DUTY_SECONDS
    for job_id in cancelling:
        while time.monotonic() < enough:
            with dispatcher.engine.begin() as connection:
                gone = chunks.cancel_pending(connection, job_id, dispatcher.drained[job_id], _DRAIN_LIMIT)
            # Chunks that become pending again behind the cursor are met on the next lap.
            dispatcher.drained[job_id] = max(gone) if len(gone) == _DRAIN_LIMIT else 0
            if len(gone) < _DRAIN_LIMIT:
                break


def snapshot(dispatcher: Dispatcher) -> None:
    """Recompute the progress that status pages read, and stop jobs that have too many rejects.

    The jobs that have been due for longest come first, as there may be too many for one turn.
    """
    with dispatcher.engine.connect() as connection:
        active = jobs.active(connection)
    dispatcher.snapshots = {job.id: dispatcher.snapshots.get(job.id, 0.0) for job in active}
    enough = time.monotonic() + _LONGEST_DUTY_SECONDS
    for job in sorted(active, key=lambda job: dispatcher.snapshots[job.id]):
        begin = time.monotonic()
        if begin < dispatcher.snapshots[job.id] or begin > enough:
            break
        try:
            _save_progress(dispatcher, job)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
        # A job with very many chunks is summed up less often, to leave time to others, while its page stays fresh.
        pause = _SNAPSHOT_FACTOR * (time.monotonic() - begin)
        dispatcher.snapshots[job.id] = begin + min(pause, status.FRESH_SECONDS / 2) if pause > 1 else begin


def _save_progress(dispatcher: Dispatcher, job: ActiveJob) -> None:
    with dispatcher.engine.begin() as connection:
        # The end of a sync may hold its job's row for long.
        connection.execute(_LITTLE_PATIENCE)
        now = status.sum_up(connection, job.id)
        jobs.save_progress(connection, job.id, now.model_dump(mode="json"))
        rejected, limit = now.items.rejected, job.max_rejects
        # A job with nothing pending has nothing to stop: its end says what became of it, all rejected perhaps.
        stoppable = now.items.pending and job.state is not JobState.CANCELLING
        if stoppable and limit is not None and rejected > limit:
            jobs.begin_cancelling(
                connection,
                job.id,
                JobState.FAILED,
                Reason.TOO_MANY_REJECTS,
                control.too_many(rejected, limit),
            )


def judge_models(dispatcher: Dispatcher) -> None:
    """Pause or fail the jobs of models that don't work.

    The queued and running jobs of a model whose claims are mostly lost are paused. If no live worker can load a local
    model, its jobs that have begun are paused, and the others fail; a gateway model's jobs are all paused. Queued and
    running jobs whose model is no longer in the catalogue as it was fail.
    """
    with dispatcher.engine.begin() as connection:
        for job in jobs.active(connection):
            if job.is_runnable and models.of_job(connection, job.id) is None:
                message = "its model is no longer in the catalogue as it was"
                jobs.begin_cancelling(connection, job.id, JobState.FAILED, Reason.MODEL_CANNOT_LOAD, message)
        _judge_dropped(connection)
        for name, (lost, distinct, commits) in lost_claims.of_models(connection, 600).items():
            # One text that kills its process loses five claims of one chunk; only losses of many chunks, or of very
            # many claims, are the workers' fault.
            if lost > commits and (distinct >= _BROKEN_CHUNKS or lost >= _BROKEN_CLAIMS):
                for job_id in jobs.running_of_model(connection, name):
                    message = f"{lost} claims lost and {commits} commits in ten minutes; see the workers' logs"
                    jobs.move(connection, job_id, JobState.PAUSED, reason=Reason.WORKERS_FAILING, message=message)


def _judge_dropped(connection: Connection) -> None:
    live = workers.live(connection)
    dropped = {name: reason for worker in live for name, reason in worker["dropped"].items()}
    for name, reason in dropped.items():
        if any(name in worker["models"] for worker in live):
            continue
        row = models.by_name(connection, name)
        for job_id in jobs.running_of_model(connection, name):
            if row and row["kind"] == "gateway":  # a person can fix it
                control.pause_for(connection, job_id, Reason.MODEL_CANNOT_LOAD, reason)
            elif jobs.has_begun(connection, job_id):  # the model could be loaded at that time
                control.pause_for(connection, job_id, Reason.WORKERS_FAILING, reason)
            else:
                control.fail(connection, job_id, Reason.MODEL_CANNOT_LOAD, reason)


def measure_rates(dispatcher: Dispatcher) -> None:
    """Store each model's measured rates by kind of device, from which the size of chunks is planned."""
    with dispatcher.engine.begin() as connection:
        for row in usage.measured_rates(connection, 3600, least_device_seconds=5):
            if row["device"] is None:
                models.set_rate(connection, row["model"], row["rate"])
            else:
                by = (row["device"], row["precision"])
                models.record_rate(connection, row["model"], *by, row["rate"], row["last_at"])


def maintain(dispatcher: Dispatcher) -> None:
    """Create partitions ahead of time; delete workers that are gone, old events, and old queries; let collections'
    previous versions go."""
    with dispatcher.engine.begin() as connection:
        partitions.make_ahead(connection)
        workers.forget_unseen(connection, 3600)
        events.forget_old(connection, _EVENT_DAYS)
        collection_versions.retire(connection)
        sql_requests.forget_queries(connection, dispatcher.text_retention_days)


def remove_old_texts(dispatcher: Dispatcher) -> None:
    """Delete item texts that are past their retention, range by range."""
    enough = time.monotonic() + _LONGEST_DUTY_SECONDS
    while time.monotonic() < enough:
        with dispatcher.engine.begin() as connection:
            due = jobs.take_old_texts(connection, dispatcher.text_retention_days, _REMOVE_LIMIT)
            if due is None:
                return
            items.remove_texts(connection, *due, _REMOVE_LIMIT)
