"""Heartbeat of a worker: a thread of the parent that follows the catalogue, frees the chunks of dead children, and
rests the worker when too many die."""

import queue
import socket
import threading
import time
from collections.abc import Sequence
from uuid import UUID

import structlog
from celery import Celery
from sqlalchemy import Connection, RowMapping
from sqlalchemy.exc import DBAPIError

from pipeline.broker import queue_of
from pipeline.db import lost_claims, models, workers
from pipeline.db.database import make_engine
from pipeline.infra.settings import Settings, read_key

log = structlog.get_logger()

_PERIOD_SECONDS = 5.0
#: A worker that loses this many different chunks without a commit in between is more likely broken than its texts.
_LOST_CHUNKS = 3
_REST_SECONDS = 300.0


class Heartbeat:
    """Heartbeat thread of a worker's parent process."""

    def __init__(self, app: Celery, settings: Settings, worker_id: UUID, hostname: str) -> None:
        url = settings.database_url
        assert url is not None
        self._app, self._settings, self._worker_id, self._hostname = app, settings, worker_id, hostname
        self._engine = make_engine(url.get_secret_value(), application="vectormill-heartbeat", pool_size=1)
        self._lost: queue.SimpleQueue[tuple[int, str, str] | None] = queue.SimpleQueue()
        self._consuming: set[str] = set()
        self._keyless: set[str] = set()
        self._rests_until = 0.0
        self._next_show = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread, which registers the worker and listens to the queues of the catalogue's models."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, which removes the worker's row. Children finish the chunks that they hold."""
        self._stopped.set()
        self._lost.put(None)

    def child_lost(self, chunk_id: int, task_id: str, cause: str) -> None:
        """Note that a child died under this task. Safe in Celery's event loop: it doesn't wait for the database."""
        self._lost.put((chunk_id, task_id, cause))

    def _run(self) -> None:
        waiting: list[tuple[int, str, str]] = []
        while True:
            waiting += self._taken()
            try:
                while waiting:
                    self._free(*waiting[0])
                    waiting.pop(0)
                if self._stopped.is_set():
                    self._leave()
                    return
                if time.monotonic() >= self._next_show:
                    self._next_show = time.monotonic() + _PERIOD_SECONDS
                    self._show()
            except DBAPIError:
                log.warning("database_unreachable")
                if self._stopped.wait(1.0):
                    return
            except Exception as error:  # noqa: BLE001 - this thread is the worker's only sign of life
                log.error("heartbeat_failed", error=type(error).__name__)
                self._stopped.wait(1.0)

    def _taken(self) -> list[tuple[int, str, str]]:
        try:
            lost = self._lost.get(timeout=max(0.05, self._next_show - time.monotonic()))
        except queue.Empty:
            return []
        return [lost] if lost else []

    def _free(self, chunk_id: int, task_id: str, cause: str) -> None:
        with self._engine.begin() as connection:
            freed = lost_claims.free_lost_claim(connection, chunk_id, self._worker_id, task_id, cause)
            if not freed:
                early = f"{cause} before its claim"
                lost_claims.note_death_before_claim(connection, chunk_id, self._worker_id, task_id, early)
        with self._engine.begin() as connection:
            lost = lost_claims.of_worker(connection, self._worker_id)
        log.warning("child_lost", chunk=chunk_id, freed=freed, cause=cause)
        if lost >= _LOST_CHUNKS and not self._resting:
            self._rests_until = time.monotonic() + _REST_SECONDS
            self._next_show = 0.0
            log.error("worker_rests", lost_chunks=lost, seconds=_REST_SECONDS)

    @property
    def _resting(self) -> bool:
        return time.monotonic() < self._rests_until

    def _show(self) -> None:
        wanted = self._settings.worker_models
        with self._engine.begin() as connection:
            rows = [
                row
                for row in models.every(connection)
                if not wanted or row["name"] in wanted or set(row["aliases"]) & set(wanted)
            ]
            self._look_for_keys(connection, rows)
            dropped = workers.dropped_by(connection, self._worker_id)
            served = {row["name"]: queue_of(row["slug"]) for row in rows if row["name"] not in dropped}
            workers.show(
                connection,
                self._worker_id,
                name=self._hostname,
                host=socket.gethostname(),
                device=",".join(self._settings.worker_devices),
                device_kinds=self._settings.worker_device_kinds,
                models=sorted(served),
                slots=len(self._settings.worker_devices) * self._settings.worker_replicas,
            )
            rest = f"lost {_LOST_CHUNKS} chunks in a row; paused, retries later" if self._resting else None
            workers.rest(connection, self._worker_id, rest)
        self._consume(set() if self._resting else set(served.values()))

    def _look_for_keys(self, connection: Connection, rows: Sequence[RowMapping]) -> None:
        """Drop an upstream's models while its key isn't set here, and take them up again once it is."""
        for row in rows:
            name, variable = row["name"], row["key_env"]
            if variable is None or (read_key(variable) is None) == (name in self._keyless):
                continue
            if name in self._keyless:
                self._keyless.discard(name)
                workers.take_up_model(connection, name, self._worker_id)
            else:
                self._keyless.add(name)
                reason = f"there is no key for {row['gateway_url']}: set {variable} or {variable}_FILE, and resume"
                workers.drop_model(connection, self._worker_id, name, reason)
                log.error("model_dropped", model=name, reason=reason)

    def _consume(self, queues: set[str]) -> None:
        """Listen to exactly these queues. A change that the event loop hasn't confirmed is retried next time."""
        control = self._app.control
        for name in queues - self._consuming:
            if control.add_consumer(name, destination=[self._hostname], reply=True, timeout=2):
                self._consuming.add(name)
                log.info("queue_added", queue=name)
        for name in self._consuming - queues:
            if control.cancel_consumer(name, destination=[self._hostname], reply=True, timeout=2):
                self._consuming.discard(name)
                log.info("queue_dropped", queue=name)

    def _leave(self) -> None:
        with self._engine.begin() as connection:
            workers.delete(connection, self._worker_id)
