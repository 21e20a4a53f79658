"""The dispatcher: a list of duties, each a function with its period. Nothing here is remembered that matters: a
dispatcher that starts afresh only rings twice for a few chunks."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import structlog
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from pipeline import completion, control, metrics, standing, status
from pipeline.background import Background
from pipeline.errors import ServiceUnreachable
from pipeline.jobs import JobState, Reason
from pipeline.publish import Publisher, queue_of
from pipeline.rounds import Rounds
from pipeline.store import chunks, events, items, jobs, losses, models, partitions, requests, usage, workers
from pipeline.store.database import is_connection_lost, plain_reason, reporting_unreachable

log = structlog.get_logger()

ROLE = "dispatcher"
_ROLE_SECONDS = 10
_DRAIN_LIMIT = 5_000
_REMOVE_LIMIT = 20_000
_SNAPSHOT_FACTOR = 20
#: A duty that has more to do than this leaves the rest for its next turn.
_LONGEST_DUTY_SECONDS = 0.5
#: So many different chunks lost, or so many claims of few, are more than texts that kill their process explain.
_BROKEN_CHUNKS = 3
_BROKEN_CLAIMS = 15
_EVENT_DAYS = 30


@dataclass(slots=True)
class Dispatcher:
    """What the duties share: connections, settings, and how far they have come."""

    engine: Engine
    publisher: Publisher
    lease_seconds: float
    text_retention_days: float
    background: Background | None = None
    #: Last chunk id cancelled, by job: going on from there, nothing that is gone is looked at again.
    drained: dict[UUID, int] = field(default_factory=dict)
    #: When each job's progress is next recomputed, by the monotonic clock.
    snapshots: dict[UUID, float] = field(default_factory=dict)
    #: No lease is expired before this moment of the monotonic clock.
    sweep_from: float = 0.0
    #: When the database last answered, by the monotonic clock.
    last_contact: float = field(default_factory=time.monotonic)
    rounds: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.publisher)


def publish(dispatcher: Dispatcher) -> None:
    """Tell workers of pending chunks."""
    with dispatcher.engine.connect() as connection:
        dispatcher.rounds.do(connection)


def sweep(dispatcher: Dispatcher) -> None:
    """Give chunks with an expired lease back, and end backends that froze while they held one."""
    with dispatcher.engine.begin() as connection:
        # Workers could not renew while the database was away: everybody gets one whole lease to come back.
        connection.execute(text("set local lock_timeout = '2s'"))
        uptime = workers.server_age_seconds(connection)
        _note_contact(dispatcher)
        if time.monotonic() < dispatcher.sweep_from or uptime < dispatcher.lease_seconds:
            return
        expired = losses.expire_leases(connection, 500)
    if expired:
        metrics.DISPATCHER_LEASES_EXPIRED.inc(len(expired))
        log.warning("leases_expired", chunks=expired)
    with dispatcher.engine.begin() as connection:
        ended = losses.terminate_frozen_backends(connection, dispatcher.lease_seconds)
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
            # What comes back to pending behind the cursor is met on the next lap.
            dispatcher.drained[job_id] = max(gone) if len(gone) == _DRAIN_LIMIT else 0
            if len(gone) < _DRAIN_LIMIT:
                break


def finish(dispatcher: Dispatcher) -> None:
    """End jobs that have no open chunk."""
    with dispatcher.engine.connect() as connection:
        over = jobs.without_open_chunks(connection)
    for job_id in over:
        if not (dispatcher.background and dispatcher.background.is_under_way("finalize_job", job_id)):
            completion.end(dispatcher.engine, job_id)


def snapshot(dispatcher: Dispatcher) -> None:
    """Recompute the progress that status pages read, and stop jobs that have too many rejects. Of very many jobs, those
    come first whose turn is longest due."""
    with dispatcher.engine.connect() as connection:
        active = jobs.active(connection)
    dispatcher.snapshots = {job.id: dispatcher.snapshots.get(job.id, 0.0) for job in active}
    enough = time.monotonic() + _LONGEST_DUTY_SECONDS
    for job in sorted(active, key=lambda job: dispatcher.snapshots[job.id]):
        begin = time.monotonic()
        if begin < dispatcher.snapshots[job.id] or begin > enough:
            break
        with dispatcher.engine.begin() as connection:
            now = status.sum_up(connection, job.id)
            jobs.save_progress(connection, job.id, now.model_dump(mode="json"))
            rejected, limit = now.items.rejected, job.max_rejects
            if limit is not None and rejected > limit and job.state is not JobState.CANCELLING:
                jobs.begin_cancelling(
                    connection,
                    job.id,
                    JobState.FAILED,
                    Reason.TOO_MANY_REJECTS,
                    control.too_many(rejected, limit),
                )
        # Sums over very many chunks leave time to others, as far as pages stay fresh.
        pause = _SNAPSHOT_FACTOR * (time.monotonic() - begin)
        dispatcher.snapshots[job.id] = begin + min(pause, status.FRESH_SECONDS / 2) if pause > 1 else begin


def judge_models(dispatcher: Dispatcher) -> None:
    """Pause the jobs of a model whose claims are mostly lost, and of one that no live worker can load; of the latter
    those fail that haven't begun."""
    with dispatcher.engine.begin() as connection:
        for job in jobs.active(connection):
            if job.is_runnable and models.of_job(connection, job.id) is None:
                message = "its model is no longer in the catalogue as it was"
                jobs.begin_cancelling(connection, job.id, JobState.FAILED, Reason.MODEL_CANNOT_LOAD, message)
        _judge_dropped(connection)
        for name, (lost, distinct, commits) in losses.of_models(connection, 600).items():
            # One text that kills its process loses five claims of one chunk; only losses all over are the workers'.
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
            if row and row["kind"] == "gateway":  # a person can mend it
                control.pause_for(connection, job_id, Reason.MODEL_CANNOT_LOAD, reason)
            elif jobs.has_begun(connection, job_id):  # it could be loaded then
                control.pause_for(connection, job_id, Reason.WORKERS_FAILING, reason)
            else:
                control.fail(connection, job_id, Reason.MODEL_CANNOT_LOAD, reason)


def measure_rates(dispatcher: Dispatcher) -> None:
    """Keep each model's measured rate, by which chunks are cut."""
    with dispatcher.engine.begin() as connection:
        for name, rate in usage.measured_rates(connection, 3600, least_device_seconds=5).items():
            models.set_rate(connection, name, rate)


def keep_house(dispatcher: Dispatcher) -> None:
    """Make partitions ahead; forget workers that are gone, old events, and old queries."""
    with dispatcher.engine.begin() as connection:
        partitions.make_ahead(connection)
        workers.forget_unseen(connection, 3600)
        events.forget_old(connection, _EVENT_DAYS)
        requests.forget_queries(connection, dispatcher.text_retention_days)


def remove_old_texts(dispatcher: Dispatcher) -> None:
    """Remove item texts that are past their retention, range by range."""
    enough = time.monotonic() + _LONGEST_DUTY_SECONDS
    while time.monotonic() < enough:
        with dispatcher.engine.begin() as connection:
            due = jobs.take_old_texts(connection, dispatcher.text_retention_days, _REMOVE_LIMIT)
            if due is None:
                return
            items.remove_texts(connection, *due, _REMOVE_LIMIT)


def begin_background_tasks(dispatcher: Dispatcher) -> None:
    """Begin what takes long and is due."""
    if dispatcher.background:
        dispatcher.background.begin()


def show_standing(dispatcher: Dispatcher) -> None:
    """Let the metrics say how things stand."""
    with dispatcher.engine.connect() as connection:
        standing.show(connection, dispatcher.publisher.waiting, queue_of)


class Duty(NamedTuple):
    """Something that the leading dispatcher does again and again."""

    #: In metrics, alert rules and logs.
    name: str
    do: Callable[[Dispatcher], None]
    every_seconds: float


DUTIES = (
    Duty("publish", publish, 0.25),
    Duty("drain", drain, 0.25),
    Duty("finish", finish, 0.25),
    Duty("background", begin_background_tasks, 0.5),
    Duty("sweep", sweep, 1.0),
    Duty("snapshot", snapshot, 1.0),
    Duty("judge_models", judge_models, 5.0),
    Duty("gauges", show_standing, 5.0),
    Duty("remove_old_texts", remove_old_texts, 5.0),
    Duty("measure_rates", measure_rates, 60.0),
    Duty("maintenance", keep_house, 3600.0),
)


def run(dispatcher: Dispatcher, stop: threading.Event) -> None:
    """Do the duties while this process holds the role; wait while another does. Returns when `stop` is set."""
    holder = str(uuid4())
    due = {duty.name: 0.0 for duty in DUTIES}
    active, check_role = False, 0.0
    while not stop.wait(0.05 if active else 0.5):
        if time.monotonic() >= check_role:
            active = _attempt("lead", partial(_hold_role, dispatcher, holder), otherwise=False)
            check_role = time.monotonic() + _ROLE_SECONDS / 5
            metrics.DISPATCHER_LEADS.set(active)
            if not active:
                standing.forget()
        for duty in DUTIES if active else ():
            if time.monotonic() >= due[duty.name]:
                due[duty.name] = time.monotonic() + duty.every_seconds
                with metrics.DISPATCHER_DUTY_SECONDS.labels(duty.name).time():
                    _attempt(duty.name, partial(_do, duty, dispatcher))
    with reporting_unreachable(), dispatcher.engine.begin() as connection:
        workers.drop_lease(connection, ROLE, holder)


def _do(duty: Duty, dispatcher: Dispatcher) -> None:
    duty.do(dispatcher)
    _note_contact(dispatcher)  # many jobs make a long round, and no gap


def _hold_role(dispatcher: Dispatcher, holder: str) -> bool:
    with dispatcher.engine.begin() as connection:
        holds = workers.hold_lease(connection, ROLE, holder, _ROLE_SECONDS)
    _note_contact(dispatcher)
    return holds


def _note_contact(dispatcher: Dispatcher) -> None:
    """The database has answered; if it hadn't for long, nobody could renew, and the sweep waits."""
    now = time.monotonic()
    if now - dispatcher.last_contact > dispatcher.lease_seconds / 3 + _ROLE_SECONDS / 5:
        log.warning("sweep_waits_after_gap", gap_seconds=round(now - dispatcher.last_contact, 1))
        dispatcher.sweep_from = now + dispatcher.lease_seconds
    dispatcher.last_contact = now


def _attempt(duty: str, do: Callable[[], Any], otherwise: Any = None) -> Any:
    """One duty's failure must not keep the others from being done."""
    try:
        return do()
    except ServiceUnreachable:
        metrics.DISPATCHER_FAILURES.labels("redis").inc()
        log.warning("redis_unreachable")
    except DBAPIError as error:
        lost = is_connection_lost(error)
        metrics.DISPATCHER_FAILURES.labels("database" if lost else "other").inc()
        told = {} if lost else {"duty": duty, "error": plain_reason(error)}
        log.warning("database_unreachable" if lost else "duty_failed", **told)
    except Exception:
        metrics.DISPATCHER_FAILURES.labels("other").inc()
        log.exception("duty_failed", duty=duty)
    return otherwise
