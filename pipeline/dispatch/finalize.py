"""Finalisation of jobs: the work of a sink after a job's last chunk and before the job is completed.

It may take minutes, so it is a background task of the dispatcher.
"""

from collections.abc import Sequence
from itertools import islice
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError, InternalError, ProgrammingError

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.errors import StorageRefused, StorageUnreachable, Waiting
from pipeline.core.jobs import Job, JobState, Reason
from pipeline.db import jobs, outputs
from pipeline.db.database import plain_reason
from pipeline.dispatch import completion
from pipeline.jobs import control


def due(connection: Connection, limit: int, *, long: bool = False) -> Sequence[UUID]:
    """Return the ids of jobs without open chunks whose sink finalises, except paused ones.

    `long` selects the sinks whose finalisation may take hours, otherwise the others.
    """
    found = (jobs.by_id(connection, job_id) for job_id in jobs.without_open_chunks(connection))
    waiting = (
        job.id for job in found if job and job.state is not JobState.PAUSED and _waits(connection, job, long=long)
    )
    return list(islice(waiting, limit))


def _waits(connection: Connection, job: Job, *, long: bool) -> bool:
    sink = sink_of(job.options)
    return sink.finalizes and sink.takes_long(connection) == long


def finalize(engine: Engine, job_id: UUID) -> None:
    """Finalise a job's sink and complete the job. Pause the job if its storage or table refuses.

    Raises:
        Waiting: its storage doesn't answer, or its parts have changed in the meantime.
    """
    with engine.begin() as connection:
        # A crash of the database must not lose a commit whose part readers already see
        # (docs/explanation/decisions/0005).
        jobs.flush(connection, job_id)
        job = jobs.by_id(connection, job_id)
        if job is None:
            return
        parts = outputs.digest(connection, job_id)
        completes = completion.would_complete(connection, job)
    try:
        if completes:
            sink_of(job.options).finalize(engine, job)
    except StorageUnreachable as error:
        raise Waiting(str(error)) from error
    except StorageRefused as error:
        _pause(engine, job_id, Reason.STORAGE_REFUSED, str(error))
    except (ProgrammingError, DataError) as error:
        told = f"the index that the job asks for can't be built ({plain_reason(error)})"
        _pause(engine, job_id, Reason.TABLE_REFUSED, told)
    else:
        _end(engine, job, parts)


def _end(engine: Engine, job: Job, parts: str) -> None:
    try:
        completion.end(engine, job.id, finalized=parts)
    except (IntegrityError, ProgrammingError, DataError, InternalError) as error:
        if job.options.table is None:
            raise
        told = f"the table refuses what the sync's end changes in it ({plain_reason(error)})"
        _pause(engine, job.id, Reason.TABLE_REFUSED, told)


def _pause(engine: Engine, job_id: UUID, reason: Reason, message: str) -> None:
    with engine.begin() as connection:
        control.pause_for(connection, job_id, reason, message)
