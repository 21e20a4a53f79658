"""Finalisation of jobs: what a sink does when the last chunk has ended, before the job is completed. It may take
minutes, so it is a background task of the dispatcher."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, ProgrammingError

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.errors import StorageRefused
from pipeline.core.jobs import JobState, Reason
from pipeline.db import jobs, outputs
from pipeline.db.database import plain_reason
from pipeline.dispatch import completion
from pipeline.jobs import control


def due(connection: Connection, limit: int) -> Sequence[UUID]:
    """Jobs of which no chunk is open and whose sink has something left to do."""
    found = (jobs.by_id(connection, job_id) for job_id in jobs.without_open_chunks(connection))
    waiting = (job.id for job in found if job and job.state is not JobState.PAUSED and sink_of(job.options).finalizes)
    return [job_id for job_id, _ in zip(waiting, range(limit), strict=False)]


def finalize(engine: Engine, job_id: UUID) -> None:
    """Do what a job's sink has left to do, and complete the job; pause it where its storage or table refuses that."""
    with engine.begin() as connection:
        # A crash must not forget a commit whose part readers see: see ops/decisions/0005.
        jobs.flush(connection, job_id)
        job = jobs.by_id(connection, job_id)
        if job is None or not completion.would_complete(connection, job):
            return
        parts = outputs.digest(connection, job_id)
    try:
        sink_of(job.options).finalize(engine, job)
    except StorageRefused as error:
        _pause(engine, job_id, Reason.STORAGE_REFUSED, str(error))
    except (ProgrammingError, DataError) as error:
        told = f"the index that the job asks for can't be built ({plain_reason(error)})"
        _pause(engine, job_id, Reason.TABLE_REFUSED, told)
    else:
        completion.end(engine, job_id, finalized=parts)


def _pause(engine: Engine, job_id: UUID, reason: Reason, message: str) -> None:
    with engine.begin() as connection:
        control.pause_for(connection, job_id, reason, message)
