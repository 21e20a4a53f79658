"""Celery app of a worker, and its signal handlers. Entry point of `celery -A workers.runner.app`."""

import os
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from billiard.util import get_logger
from celery import Celery, signals

from pipeline.broker import celery_settings
from pipeline.core.errors import UserError
from pipeline.infra import metrics, metrics_server
from pipeline.infra.logs import configure_logs
from pipeline.infra.settings import Settings, load_settings
from workers.runner import fork_server, transport
from workers.runner.heartbeat import Heartbeat

#: Bytes of text that the slowest device embeds in a second.
_SLOW_BYTES_PER_SECOND = 1_200


def _make_app(settings: Settings) -> Celery:
    if settings.redis_url is None or settings.database_url is None:
        raise UserError("a worker needs VECTORMILL_DATABASE_URL and VECTORMILL_REDIS_URL.")
    transport.watch()
    made = Celery("vectormill", include=["workers.runner.tasks"])
    made.conf.update(celery_settings(settings.redis_url.get_secret_value()))
    # Last resort against a child that hangs: its watchdog ends a hung batch long before, and only this bounds reading.
    # The passages of the longest text are one item's, which no claim leaves half done.
    made.conf.task_time_limit = max(900.0, 60 * settings.chunk_seconds, settings.item_bytes / _SLOW_BYTES_PER_SECOND)
    return made


app = _make_app(load_settings())
_heartbeat: Heartbeat | None = None


def worker_id_of(hostname: str) -> UUID:
    """Return the id under which a worker's parent and children write. `hostname` is Celery's, new at each start."""
    return uuid5(NAMESPACE_URL, f"vectormill-worker:{hostname}")


@signals.celeryd_init.connect
@signals.setup_logging.connect
def _on_logging(**_: Any) -> None:
    """Replace Celery's and the pool's logging in parent and children, before Celery warns about running as root."""
    configure_logs(load_settings().log_level)
    pool = get_logger()
    pool.propagate = True
    pool.setLevel("WARNING")


@signals.worker_init.connect
def _on_start(**_: Any) -> None:
    fork_server.start()


@signals.worker_before_create_process.connect
def _before_child(**_: Any) -> None:
    """Unset the variable that makes a new child log in Celery's own form until its logs are configured."""
    os.environ.pop("_MP_FORK_LOGLEVEL_", None)


@signals.worker_ready.connect
def _on_ready(sender: Any, **_: Any) -> None:
    global _heartbeat
    settings = load_settings()
    metrics_server.serve(metrics.WORKER, settings.metrics_host, settings.metrics_port)
    _heartbeat = Heartbeat(app, settings, worker_id_of(sender.hostname), sender.hostname)
    _heartbeat.start()


@signals.worker_shutting_down.connect
def _on_shutdown(**_: Any) -> None:
    if _heartbeat:
        _heartbeat.stop()


@signals.worker_shutdown.connect
def _on_end(**_: Any) -> None:
    metrics_server.remove_folder()


@signals.task_failure.connect
def _on_failure(task_id: str, exception: BaseException, args: Any, **_: Any) -> None:
    """Count a child that died under a task, and have its claim freed. Runs in the parent."""
    if _heartbeat and isinstance(exception, WorkerLostError | TimeLimitExceeded):
        cause = "time_limit" if isinstance(exception, TimeLimitExceeded) else "child_died"
        metrics.WORKER_LEASES_LOST.labels(cause).inc()
        _heartbeat.child_lost(int(args[1]), task_id, type(exception).__name__)
