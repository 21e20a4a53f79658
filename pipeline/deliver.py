"""What a job needs when its last chunk has ended, before it is completed: its parts become a data set, the user's
table gets its index. This may take minutes, so it goes on beside the dispatcher's duties."""

import threading
import time
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, ProgrammingError

from pipeline import control, parts
from pipeline.errors import StorageRefused
from pipeline.jobs import Job, JobState, Reason
from pipeline.options import KeptOptions
from pipeline.store import into, jobs, outputs
from pipeline.store.database import plain_reason

log = structlog.get_logger()

_AGAIN_SECONDS = 10.0


class Deliveries:
    """Deliveries under way. Forgetting them costs repeating them, no more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._under_way: set[UUID] = set()
        #: Digests of the parts that were there when it was done: a retry brings more.
        self._done: dict[UUID, str] = {}

    def is_under_way(self, job_id: UUID) -> bool:
        """Whether a job is being delivered."""
        return job_id in self._under_way

    def is_done(self, connection: Connection, job: Job) -> bool:
        """Whether nothing is left to deliver for a job whose chunks have ended; begins with it if need be. Never
        waits."""
        options = job.options
        if not options.output and not options.hnsw:
            return True
        if self._done.pop(job.id, None) == outputs.digest(connection, job.id):
            return True
        if job.id not in self._under_way and job.state is not JobState.PAUSED:
            self._under_way.add(job.id)
            threading.Thread(target=self._run, args=(job.id, options), daemon=True).start()
        return False

    def _run(self, job_id: UUID, options: KeptOptions) -> None:
        try:
            self._done[job_id] = self._deliver(job_id, options)
        except StorageRefused as error:
            self._pause(job_id, Reason.STORAGE_REFUSED, str(error))
        except (ProgrammingError, DataError) as error:
            self._pause(
                job_id, Reason.TABLE_REFUSED, f"the index that the job asks for can't be built ({plain_reason(error)})"
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed, and the log says it
            log.warning("delivery_failed", job=str(job_id), error=type(error).__name__, message=str(error)[:500])
            time.sleep(_AGAIN_SECONDS)
        finally:
            self._under_way.discard(job_id)

    def _pause(self, job_id: UUID, reason: Reason, message: str) -> None:
        with self._engine.begin() as connection:
            control.pause_for(connection, job_id, reason, message)

    def _deliver(self, job_id: UUID, options: KeptOptions) -> str:
        """Returns the digest of the parts."""
        with self._engine.begin() as connection:
            # A crash must not forget a commit whose part readers see: see ops/decisions/0005.
            jobs.flush(connection, job_id)
            delivered = outputs.digest(connection, job_id)
        if folder := options.output:
            with self._engine.begin() as connection:
                written, about = outputs.of_job(connection, job_id), _about(connection, job_id)
            parts.deliver(folder, job_id, written, about)
        if options.hnsw and options.table:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                into.build_hnsw(connection, options.table)
        return delivered


def _about(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """What a manifest says of its job."""
    job = jobs.by_id(connection, job_id)
    assert job
    space = jobs.vector_space(connection, job_id)
    return {
        "name": job.name,
        "labels": job.labels,
        "model": job.model,
        "vector_space": space["fingerprint"],
        "dimensions": space["dimensions"],
        "dtype": job.options.dtype,
        "carried": job.options.columns.carry,
    }
