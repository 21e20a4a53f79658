"""Batch requests: an input file becomes a job, or attaches to an earlier job with the same content (idempotency key).

Background tasks of the dispatcher do this, and the work of `results` at the job's end. Each may be killed midway or be
done twice.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import PurePath
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine, RowMapping

from pipeline.batch_api import files
from pipeline.catalog.models import find_model, vector_space_of
from pipeline.core.errors import (
    LeaseLost,
    NotRetriable,
    SourceChanged,
    StorageRefused,
    UnknownModel,
    UserError,
    Waiting,
)
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.core.requests import BatchState
from pipeline.db import batches, events, jobs
from pipeline.db import files as kept_files
from pipeline.infra.settings import Settings
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit
from pipeline.jobs import control
from pipeline.sources.batch_lines import BatchLines, Fault, Wish

log = structlog.get_logger()

_NAME_LETTERS = 200


class _BatchRefused(Exception):
    """The input file isn't a valid batch request."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


class _LetGo(Exception):
    """The batch request was cancelled or has expired in the meantime, or another dispatcher has made a job of it."""


def stage(engine: Engine, settings: Settings, batch_id: str) -> None:
    """Make a job of a batch request, or end it as failed with the errors of its file.

    Raises:
        Waiting: another batch request of the same content is being staged.
        StorageRefused, StorageUnreachable: the file can't be read now.
    """
    with engine.begin() as connection:
        batch = batches.by_id(connection, batch_id)
        file = batch and kept_files.find(connection, batch["workspace_id"], batch["input_file_id"])
    if batch is None or batch["state"] != BatchState.VALIDATING or batch["ends_as"]:
        return
    try:
        if file is None:
            raise _BatchRefused([Fault("file_not_found", f"the input file {batch['input_file_id']} is gone.")])
        job_id = _submit(engine, settings, batch, file)
    except (_LetGo, LeaseLost):  # it has ended, or belongs to another dispatcher now
        return
    except _BatchRefused as refused:
        _fail(engine, batch, refused.faults)
    except SourceChanged:  # its message holds the file's path, which the caller mustn't see
        gone = f"the bytes of the input file {batch['input_file_id']} are gone, or others; upload it again."
        _fail(engine, batch, [Fault("file_not_found", gone)])
    except StorageRefused:  # for the operator to fix
        raise
    except UnknownModel as error:
        _fail(engine, batch, [Fault("model_not_found", str(error), param="body.model")])
    except UserError as error:
        _fail(engine, batch, [Fault("invalid_request", str(error))])
    else:
        log.info("batch_request_staged", batch=batch_id, job=str(job_id))


def _fail(engine: Engine, batch: RowMapping, faults: Sequence[Fault]) -> None:
    with engine.begin() as connection:
        end(connection, batch, BatchState.FAILED, errors=[asdict(fault) for fault in faults])
    log.info("batch_request_refused", batch=batch["id"], codes=sorted({fault.code for fault in faults}))


def end(connection: Connection, batch: RowMapping, state: BatchState, **results: Any) -> bool:
    """End a batch request, and queue an event for its workspace's webhook. Return False if it had ended already."""
    ended = batches.end(connection, batch["id"], state, **results)
    if ended:
        events.add(connection, batch["workspace_id"], f"batch.{state}", {"id": batch["id"]})
    return ended


def _submit(engine: Engine, settings: Settings, batch: RowMapping, file: RowMapping) -> UUID:
    corpus = BatchLines(
        file["name"],
        f"file:{file['id']}",
        file["sha256"],
        file["bytes"],
        partial(files.open_kept, file),
        settings.item_bytes,
    )
    wish = _wish_of(corpus, settings)
    with engine.begin() as connection:
        model = find_model(connection, batch["workspace_id"], wish.model)
        key = _key(connection, file, model, wish, batch["max_rejects"])
    submission = Submission(
        workspace_id=batch["workspace_id"],
        model=model,
        corpus=corpus,
        planning=planning(settings),
        name=PurePath(file["name"]).stem[:_NAME_LETTERS] or batch["id"],
        options=JobOptions(dimensions=wish.dimensions, max_rejects=batch["max_rejects"]),
        labels=batch["metadata"] or {},
        idempotency_key=key,
        submitted_by=f"batch request {batch['id']}",
        # In the transaction that queues the job: a job without a batch request would run, and be paid for, in vain.
        on_queue=partial(_begin, batch_id=batch["id"], model=wish.model),
    )
    while True:
        try:
            made = submit(engine, submission)
        except NotRetriable as error:
            with engine.begin() as connection:
                jobs.release_key(connection, error.job_id)
            continue
        if not made.attached or _attach(engine, batch["id"], made.job_id, wish.model):
            return made.job_id


def _wish_of(corpus: BatchLines, settings: Settings) -> Wish:
    """Return the model and dimensions that all lines of the file ask for.

    Raises:
        _BatchRefused: the lines differ, or there are too many, or none is valid.
    """
    survey = corpus.survey(settings.batch_lines)
    if survey.faults:
        raise _BatchRefused(survey.faults)
    if not survey.lines:
        raise _BatchRefused([Fault("empty_file", "the input file has no line; there is nothing to embed.")])
    if survey.wish is None:
        raise _BatchRefused(survey.bad_lines)
    return survey.wish


def _key(connection: Connection, file: RowMapping, model: Model, wish: Wish, max_rejects: str) -> str:
    """Return the idempotency key, which is the same for all batch requests that lead to the same vectors."""
    try:
        space = vector_space_of(connection, model, dimensions=wish.dimensions, max_item_tokens=None)
    except UserError as error:
        fault = Fault("invalid_request", str(error), param="body.dimensions")
        raise _BatchRefused([fault]) from error
    content = [file["sha256"], model.name, space, wish.dimensions, max_rejects]
    return f"batch:{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}"


def _begin(connection: Connection, job_id: UUID, *, batch_id: str, model: str) -> None:
    """Attach a batch request to a job, in the transaction that makes the job runnable.

    Raises:
        _LetGo: the batch request has a job already, or is ending.
    """
    if not batches.begin(connection, batch_id, job_id, model):
        raise _LetGo


def _attach(engine: Engine, batch_id: str, job_id: UUID, model: str) -> bool:
    """Attach a batch request to an existing job.

    Return False if the job is gone, cancelled or being cancelled; a cancelled job's key is released for a new job.

    Raises:
        Waiting: the job is being staged.
        _LetGo: the batch request has another job already, or is ending.
    """
    with engine.begin() as connection:
        job = jobs.by_id(connection, job_id)
        if job and job.state == JobState.STAGING:  # don't wait for its row, which its producer locks while it copies
            raise Waiting("the same content is being staged by another batch request.")
        # `let_go` takes the same locks, so that no batch request attaches to a job that is about to be cancelled.
        batch = batches.lock(connection, batch_id)
        if batch and batch["job_id"] == job_id:  # the job was resumed for this batch request
            return True
        job = jobs.lock(connection, job_id)
        if job is None:
            return False
        if job.state == JobState.CANCELLED or job.ends_as == JobState.CANCELLED:
            jobs.release_key(connection, job_id)
            return False
        _begin(connection, job_id, batch_id=batch_id, model=model)
    return True


def let_go(connection: Connection, batch_id: str, ends_as: BatchState) -> bool:
    """Cancel a batch request, or let it expire, by `ends_as`. Return False if it was ending already.

    Its job is cancelled too, unless another batch request waits for it. Finished results stay.
    """
    batch = batches.lock(connection, batch_id)
    job = jobs.lock(connection, batch["job_id"]) if batch and batch["job_id"] else None
    if not batches.let_go(connection, batch_id, ends_as):
        return False
    if job and not job.state.ended and not batches.goes_on_for_others(connection, job.id):
        control.cancel(connection, job.id)
    return True


def expire(engine: Engine, batch_id: str) -> None:
    """Expire a batch request."""
    with engine.begin() as connection:
        if let_go(connection, batch_id, BatchState.EXPIRED):
            log.info("batch_request_expired", batch=batch_id)
