"""Background tasks of the dispatcher, which take seconds to hours: each piece of work runs in a thread of its own.

A piece may be killed midway, or be done by two dispatchers at once: the database decides which result counts.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from pipeline import db
from pipeline.batch_api import batches, files, results
from pipeline.core.errors import Waiting
from pipeline.db.database import is_connection_lost, plain_reason
from pipeline.db.staging import Producer
from pipeline.dispatch import finalize
from pipeline.infra import metrics
from pipeline.infra.settings import Settings
from pipeline.ingest import sql_requests, staging
from pipeline.jobs import collection_files, erasure
from pipeline.webhooks.delivery import deliver as deliver_events

log = structlog.get_logger()

#: First and longest delay before a piece is retried that failed or must wait; it doubles each time (backoff).
_AGAIN_SECONDS, _MOST_AGAIN_SECONDS = 10.0, 600.0
#: Age of a submission's expired lease at which the submission is given up for dead.
_STAGING_DEAD_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of the background tasks."""

    #: Each running piece may hold two of its connections.
    engine: Engine
    settings: Settings


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """A kind of background work, done piece by piece."""

    name: str
    #: Lists the ids of due pieces, the oldest first, up to a limit.
    due: Callable[[Connection, int], Sequence[Hashable]]
    #: Does one piece.
    do: Callable[[Resources, Any], object]
    #: The most pieces at a time.
    at_once: int = 2


def _forget_staging(resources: Resources, dead: Producer) -> None:
    staging.undo(resources.engine, dead)
    log.info("dead_staging_forgotten", job=str(dead.job_id))


def _drop_version(resources: Resources, version: int) -> None:
    with resources.engine.begin() as connection:
        db.collection_versions.drop(connection, version)
    log.info("collection_version_dropped", version=version)


TASKS: tuple[BackgroundTask, ...] = (
    BackgroundTask(
        "stage_request",
        db.sql_requests.due,
        lambda by, job: sql_requests.stage(by.engine, by.settings, job),
    ),
    BackgroundTask(
        "stage_batch_request",
        db.batches.to_stage,
        lambda by, batch: batches.stage(by.engine, by.settings, batch),
    ),
    BackgroundTask(
        "finish_batch_request",
        db.batches.to_end,
        lambda by, batch: results.finish(by.engine, by.settings, batch),
    ),
    BackgroundTask(
        "expire_batch_request",
        db.batches.to_expire,
        lambda by, batch: batches.expire(by.engine, batch),
        at_once=1,
    ),
    BackgroundTask(
        "forget_staging",
        lambda connection, limit: db.staging.dead(connection, _STAGING_DEAD_SECONDS, limit),
        _forget_staging,
        at_once=1,
    ),
    BackgroundTask(
        "forget_keys",
        db.forgets.unfinished,
        lambda by, forget: erasure.erase(by.engine, forget, partial(files.erase_keys, by.engine, by.settings)),
        at_once=1,
    ),
    BackgroundTask(
        "write_collection_files",
        db.collection_files.due,
        lambda by, version: collection_files.write_files(by.engine, version),
    ),
    BackgroundTask("drop_version", db.collection_versions.gone, _drop_version, at_once=1),
    BackgroundTask("forget_file", db.files.expired, lambda by, file: files.delete_file(by.engine, file), at_once=1),
    BackgroundTask("finalize_job", finalize.due, lambda by, job: finalize.finalize(by.engine, job), at_once=8),
    BackgroundTask("build_index", partial(finalize.due, long=True), lambda by, job: finalize.finalize(by.engine, job)),
    BackgroundTask(
        "deliver_events",
        db.events.due,
        lambda by, host: deliver_events(by.engine, by.settings, host),
        at_once=4,
    ),
)

#: Connections that all tasks may need at once, one more to list due pieces, and one for a request to forget keys, which
#: holds two locks.
CONNECTIONS = 2 + 2 * sum(task.at_once for task in TASKS)


class Background:
    """Runner of the background tasks. If its state is lost, pieces are done again, and nothing worse."""

    def __init__(self, resources: Resources, kinds: Sequence[BackgroundTask] = TASKS) -> None:
        self._resources, self._kinds = resources, kinds
        #: Guards the fields below, which threads change when they end.
        self._lock = threading.Lock()
        #: Running pieces, by task and piece.
        self.under_way: set[tuple[str, Hashable]] = set()
        #: Times before which a piece isn't retried, by the monotonic clock.
        self._rests: dict[tuple[str, Hashable], float] = {}
        #: Last retry delay of each piece, in seconds.
        self._rested: dict[tuple[str, Hashable], float] = {}

    def begin(self) -> None:
        """Start due pieces of each task, up to its limit, without waiting for them."""
        for kind in self._kinds:
            with self._lock:
                now = time.monotonic()
                self._rests = {piece: until for piece, until in self._rests.items() if until > now}
                not_now = {piece for name, piece in (*self.under_way, *self._rests) if name == kind.name}
                room = kind.at_once - sum(name == kind.name for name, _ in self.under_way)
            if room <= 0:
                continue
            with self._resources.engine.connect() as connection:
                due = kind.due(connection, room + len(not_now))
            for piece in [piece for piece in due if piece not in not_now][:room]:
                with self._lock:
                    self.under_way.add((kind.name, piece))
                threading.Thread(target=partial(self._run, kind, piece), daemon=True).start()

    def _run(self, kind: BackgroundTask, piece: Hashable) -> None:
        which = (kind.name, piece)
        try:
            kind.do(self._resources, piece)
            with self._lock:
                self._rested.pop(which, None)
        except Waiting as waiting:
            self._rest(which, waiting.most_seconds or _MOST_AGAIN_SECONDS)
            log.info("background_task_waits", task=kind.name, piece=str(piece), message=str(waiting))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed, and the log says it
            self._rest(which)
            lost = isinstance(error, DBAPIError) and is_connection_lost(error)
            metrics.DISPATCHER_FAILURES.labels("database" if lost else "other").inc()
            told = plain_reason(error) if isinstance(error, DBAPIError) else str(error)[:500]
            log.warning(
                "background_task_failed", task=kind.name, piece=str(piece), error=type(error).__name__, message=told
            )
        finally:
            with self._lock:
                self.under_way.discard(which)

    def _rest(self, which: tuple[str, Hashable], most_seconds: float = _MOST_AGAIN_SECONDS) -> None:
        with self._lock:
            rest = min(most_seconds, 2 * self._rested.get(which, _AGAIN_SECONDS / 2))
            self._rested[which] = rest
            self._rests[which] = time.monotonic() + rest
