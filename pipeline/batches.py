"""Batch requests: an input file becomes a job, or attaches to the one that the same content made before; the job's end
becomes an output file and an error file.

The errands of the dispatcher do this; each may be killed midway, or be done twice.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import PurePath
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import UUID

import numpy as np
import orjson
import structlog
from sqlalchemy import Connection, Engine, RowMapping

from pipeline import control, files, status
from pipeline.catalog import find_model
from pipeline.errors import ServiceUnreachable, StorageRefused, UnknownModel, UserError
from pipeline.jobs import BatchState, JobState, Model
from pipeline.settings import Settings
from pipeline.sources.batch_lines import BatchLines, Fault, Wish
from pipeline.store import batches, embeddings, events, items, jobs
from pipeline.store import files as kept_files
from pipeline.submit import Options, Submission, Submitted, planning, submit

log = structlog.get_logger()

_PAGE = 1_000
_MOST_FAULTS = 100
_NAME_LETTERS = 200
#: What stands in the error file for a line whose turn didn't come.
_LEFT = {
    BatchState.CANCELLED: ("batch_cancelled", "the batch request was cancelled before this line's turn came."),
    BatchState.EXPIRED: ("batch_expired", "the completion window passed before this line's turn came."),
}


class _BatchRefused(Exception):
    """The file can't be a batch request."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


def stage(engine: Engine, settings: Settings, batch_id: str) -> None:
    """Make a job of a batch request, or end it as failed with what is wrong."""
    with engine.begin() as connection:
        batch = batches.by_id(connection, batch_id)
        file = batch and kept_files.find(connection, batch["workspace_id"], batch["input_file_id"])
    if batch is None or batch["state"] != BatchState.VALIDATING or batch["ends_as"]:
        return
    try:
        if file is None:
            raise _BatchRefused([Fault("file_not_found", f"the input file {batch['input_file_id']} is gone.")])
        made, model = _submit(engine, settings, batch, file)
    except _BatchRefused as refused:
        _fail(engine, batch, refused.faults)
    except StorageRefused:  # the operator's to mend
        raise
    except UnknownModel as error:
        _fail(engine, batch, [Fault("model_not_found", str(error), param="body.model")])
    except UserError as error:
        _fail(engine, batch, [Fault("invalid_request", str(error))])
    else:
        log.info("batch_request_staged", batch=batch_id, job=str(made), model=model)


def _fail(engine: Engine, batch: RowMapping, faults: Sequence[Fault]) -> None:
    with engine.begin() as connection:
        _end(connection, batch, BatchState.FAILED, errors=[asdict(fault) for fault in faults])
    log.info("batch_request_refused", batch=batch["id"], codes=sorted({fault.code for fault in faults}))


def _end(connection: Connection, batch: RowMapping, state: BatchState, **results: Any) -> bool:
    """End a batch request, and let its workspace's webhook be told. False: it had ended."""
    ended = batches.end(connection, batch["id"], state, **results)
    if ended:
        events.add(connection, batch["workspace_id"], f"batch.{state}", {"id": batch["id"]})
    return ended


def _submit(engine: Engine, settings: Settings, batch: RowMapping, file: RowMapping) -> tuple[UUID, str]:
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
    name = PurePath(file["name"]).stem[:_NAME_LETTERS] or batch["id"]
    for generation in count():
        options = Options(
            name=name,
            dimensions=wish.dimensions,
            max_rejects=batch["max_rejects"],
            labels=batch["metadata"] or {},
            idempotency_key=_key(file, model, wish, batch["max_rejects"], generation),
        )
        submission = Submission(
            workspace_id=batch["workspace_id"],
            model=model,
            corpus=corpus,
            options=options,
            planning=planning(settings),
        )
        made = submit(engine, submission)
        if _attach(engine, batch["id"], made, wish.model):
            return made.job_id, model.name
    raise AssertionError("a number is never the last")


def _wish_of(corpus: BatchLines, settings: Settings) -> Wish:
    """What the file's lines agree on.

    Raises:
        _BatchRefused: they don't, or there are too many, or none that is right.
    """
    survey = corpus.survey(settings.batch_lines)
    if survey.faults:
        raise _BatchRefused(survey.faults)
    if not survey.lines:
        raise _BatchRefused([Fault("empty_file", "the input file has no line; there is nothing to embed.")])
    if survey.wish is None:
        raise _BatchRefused(survey.bad_lines)
    return survey.wish


def _key(file: RowMapping, model: Model, wish: Wish, max_rejects: str, generation: int) -> str:
    """The idempotency key of all batch requests that come to the same vectors. A cancelled job isn't taken up again:
    the next generation is another job."""
    content = [file["sha256"], model.name, model.weights_sha256, wish.dimensions, max_rejects]
    return f"batch:{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}:{generation}"


def _attach(engine: Engine, batch_id: str, made: Submitted, model: str) -> bool:
    """Attach to a job, unless it was cancelled or is being so.

    Raises:
        ServiceUnreachable: another batch request of the same content stages it right now; nothing is wrong.
    """
    with engine.begin() as connection:
        # Who lets go of a job holds these locks too, so that none attaches to one that is about to be cancelled.
        batches.lock(connection, batch_id)
        job = jobs.lock(connection, made.job_id)
        if job is None or job["state"] == JobState.STAGING:
            raise ServiceUnreachable("the same content is being staged by another batch request; try again.")
        stopped = job["state"] == JobState.CANCELLED or job["ends_as"] == JobState.CANCELLED
        if not stopped and not batches.begin(connection, batch_id, made.job_id, model):
            _stop_unless_awaited(connection, job)
    return not stopped


def _stop_unless_awaited(connection: Connection, job: RowMapping) -> None:
    if not JobState(job["state"]).ended and not batches.goes_on_for_others(connection, job["id"]):
        control.cancel(connection, job["id"])


def let_go(connection: Connection, batch_id: str, ends_as: BatchState) -> bool:
    """Cancel a batch request, or let it expire; its job too, unless another one waits for that. What is finished stays.
    False: it was ending already."""
    batch = batches.lock(connection, batch_id)
    job = jobs.lock(connection, batch["job_id"]) if batch and batch["job_id"] else None
    if not batches.let_go(connection, batch_id, ends_as):
        return False
    if job:
        _stop_unless_awaited(connection, job)
    return True


def expire(engine: Engine, batch_id: str) -> None:
    """Let a batch request expire."""
    with engine.begin() as connection:
        if let_go(connection, batch_id, BatchState.EXPIRED):
            log.info("batch_request_expired", batch=batch_id)


def finish(engine: Engine, settings: Settings, batch_id: str) -> None:
    """Write a batch request's files, and end it."""
    with engine.begin() as connection:
        batches.begin_finalizing(connection, batch_id)
        batch = batches.by_id(connection, batch_id)
        job = jobs.by_id(connection, batch["job_id"]) if batch and batch["job_id"] else None
        account = status.sum_up(connection, job["id"])["items"] if job else None
    if batch is None or batch["ended_at"] is not None:
        return
    if job is None or account is None:
        _end_without_job(engine, batch)
        return
    state = BatchState(batch["ends_as"] or job["state"])
    # A failed job's vectors are there for who asks for them by its id; no next step must take them for the whole.
    output = (
        None if state is BatchState.FAILED else _keep(engine, settings, batch, "output", _output(engine, batch, job))
    )
    error = _keep(engine, settings, batch, "error", _errors(engine, job["id"], state))
    ended = False
    try:
        with engine.begin() as connection:
            ended = _end(
                connection,
                batch,
                state,
                output_file_id=output,
                error_file_id=error,
                errors=_errors_of(connection, job) if state is BatchState.FAILED else (),
                counts={
                    "total": account["total"],
                    "completed": account["embedded"] + account["reused"],
                    "failed": account["rejected"],
                },
            )
    finally:
        if not ended:  # another dispatcher was first
            for file_id in filter(None, (output, error)):
                files.forget(engine, file_id)
    if ended:
        log.info("batch_request_ended", batch=batch_id, job=str(job["id"]), state=state.value)


def _end_without_job(engine: Engine, batch: RowMapping) -> None:
    gone = Fault("job_purged", f"its job {batch['job_id']} was purged before the results were written.")
    state = BatchState(batch["ends_as"]) if batch["job_id"] is None else BatchState.FAILED
    with engine.begin() as connection:
        _end(connection, batch, state, errors=[asdict(gone)] if batch["job_id"] else ())


def _errors_of(connection: Connection, job: RowMapping) -> list[dict[str, Any]]:
    """Why a job failed, and the first lines that were rejected."""
    told = job["message"] or (job["reason"] or "it failed").replace("_", " ")
    rejects = items.rejects_with_carried(connection, job["id"], -1, _MOST_FAULTS - 1)
    lines = [Fault(row["code"], row["message"], (row["carried"] or {}).get("line")) for row in rejects]
    return [asdict(fault) for fault in (Fault(job["reason"] or "failed", f"{told}."), *lines)]


def _keep(
    engine: Engine, settings: Settings, batch: RowMapping, kind: str, lines: Iterator[Mapping[str, Any]]
) -> str | None:
    """Keep lines as a file; no file where there is none. Returns its id."""
    with TemporaryFile() as held:
        for line in lines:
            held.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        if not held.tell():
            return None
        held.seek(0)
        source: BinaryIO = held
        made = files.keep(
            engine,
            settings,
            batch["workspace_id"],
            purpose="batch_output",
            name=f"{batch['id']}_{kind}.jsonl",
            source=source,
            lives_seconds=batch["output_seconds"],
        )
    return str(made["id"])


def _output(engine: Engine, batch: RowMapping, job: RowMapping) -> Iterator[Mapping[str, Any]]:
    """A line for each vector, in the order of the input."""
    after = 0
    while True:
        with engine.begin() as connection:
            page = embeddings.page(connection, job["id"], after, job["items_total"], _PAGE)
        for index, key, vector, tokens, truncated, carried in page:
            one: dict[str, Any] = {"object": "embedding", "index": 0, "embedding": _written(vector, carried)}
            body = {
                "object": "list",
                "data": [{**one, "truncated": True} if truncated else one],
                "model": batch["model"],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
            response = {"status_code": 200, "request_id": _request_id(job["id"], index), "body": body}
            yield {**_head(job["id"], index, key), "response": response, "error": None}
        if len(page) < _PAGE:
            return
        after = page[-1][0] + 1


def _written(vector: Any, carried: Mapping[str, Any] | None) -> Any:
    floats = np.ascontiguousarray(vector, dtype="<f4")
    if (carried or {}).get("encoding_format") == "base64":
        return base64.b64encode(floats.tobytes()).decode()
    return floats


def _errors(engine: Engine, job_id: UUID, state: BatchState) -> Iterator[Mapping[str, Any]]:
    """A line for each reject; then, where the batch request was stopped, for each item whose turn didn't come."""
    for row in _pages(engine, partial(items.rejects_with_carried, job_id=job_id)):
        yield _error_line(job_id, row, row["code"], row["message"])
    if state in _LEFT:
        code, message = _LEFT[state]
        for row in _pages(engine, partial(items.unsettled, job_id=job_id)):
            yield _error_line(job_id, row, code, message)


def _pages(engine: Engine, read: Callable[..., list[RowMapping]]) -> Iterator[RowMapping]:
    after = -1
    while True:
        with engine.begin() as connection:
            page = read(connection, after=after, limit=_PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1]["index"]


def _error_line(job_id: UUID, row: RowMapping, code: str, message: str) -> Mapping[str, Any]:
    line = (row["carried"] or {}).get("line")
    if line is not None and not message.startswith("line "):
        message = f"line {line:,}: {message}"
    error = {"code": code, "message": message, "line": line}
    return {**_head(job_id, row["index"], row["key"]), "response": None, "error": error}


def _head(job_id: UUID, index: int, key: str | None) -> dict[str, Any]:
    return {"id": f"batch_req_{job_id.hex}_{index}", "custom_id": key}


def _request_id(job_id: UUID, index: int) -> str:
    return f"req_{job_id.hex}_{index}"
