"""Main loop of the dispatcher: while it is the leader, it repeats each duty at the duty's interval."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import structlog
from sqlalchemy.exc import DBAPIError

from pipeline.broker import queue_of
from pipeline.core.errors import ServiceUnreachable
from pipeline.db import jobs
from pipeline.db.database import is_connection_lost, plain_reason, reporting_unreachable
from pipeline.dispatch import completion, gauges, maintenance
from pipeline.dispatch.leader import CHECK_SECONDS, Leadership
from pipeline.dispatch.state import Dispatcher
from pipeline.infra import metrics

log = structlog.get_logger()


def publish(dispatcher: Dispatcher) -> None:
    """Send messages for pending chunks to workers."""
    with dispatcher.engine.connect() as connection:
        dispatcher.scheduler.do(connection)


def finish(dispatcher: Dispatcher) -> None:
    """End the jobs that have no open chunk."""
    with dispatcher.engine.connect() as connection:
        over = jobs.without_open_chunks(connection)
    for job_id in over:
        completion.end(dispatcher.engine, job_id)


def begin_background_tasks(dispatcher: Dispatcher) -> None:
    """Start background tasks that are due."""
    if dispatcher.background:
        dispatcher.background.begin()


def show_gauges(dispatcher: Dispatcher) -> None:
    """Update the gauges of jobs, chunks, queues and workers."""
    with dispatcher.engine.connect() as connection:
        gauges.show(connection, dispatcher.publisher.waiting, queue_of)


class Duty(NamedTuple):
    """A periodic task of the leader."""

    #: Name in metrics, alert rules and logs.
    name: str
    do: Callable[[Dispatcher], None]
    every_seconds: float


DUTIES = (
    Duty("publish", publish, 0.25),
    Duty("drain", maintenance.drain, 0.25),
    Duty("finish", finish, 0.25),
    Duty("background", begin_background_tasks, 0.5),
    Duty("sweep", maintenance.sweep, 1.0),
    Duty("snapshot", maintenance.snapshot, 1.0),
    Duty("judge_models", maintenance.judge_models, 5.0),
    Duty("gauges", show_gauges, 5.0),
    Duty("remove_old_texts", maintenance.remove_old_texts, 5.0),
    Duty("measure_rates", maintenance.measure_rates, 60.0),
    Duty("maintenance", maintenance.maintain, 3600.0),
)


def run(dispatcher: Dispatcher, stop: threading.Event) -> None:
    """Do the duties while this process is the leader, and stand by while another is. Return when `stop` is set."""
    leadership = Leadership(dispatcher.engine)
    due = {duty.name: 0.0 for duty in DUTIES}
    active, check_role = False, 0.0
    while not stop.wait(0.05 if active else 0.5):
        if time.monotonic() >= check_role:
            active = _attempt("lead", partial(_lead, dispatcher, leadership), otherwise=False)
            check_role = time.monotonic() + CHECK_SECONDS
            metrics.DISPATCHER_LEADS.set(active)
            if not active:
                gauges.clear()
        for duty in DUTIES if active else ():
            if time.monotonic() >= due[duty.name]:
                due[duty.name] = time.monotonic() + duty.every_seconds
                with metrics.DISPATCHER_DUTY_SECONDS.labels(duty.name).time():
                    _attempt(duty.name, partial(_do, duty, dispatcher))
    with reporting_unreachable():
        leadership.resign()


def _do(duty: Duty, dispatcher: Dispatcher) -> None:
    duty.do(dispatcher)
    dispatcher.note_contact()  # a pass takes long when there are many jobs, but that is no gap in the database


def _lead(dispatcher: Dispatcher, leadership: Leadership) -> bool:
    leads = leadership.renew()
    dispatcher.note_contact()
    return leads


def _attempt(duty: str, do: Callable[[], Any], otherwise: Any = None) -> Any:
    """Call `do` and return its result; log a failure and return `otherwise`, so that the other duties go on."""
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
