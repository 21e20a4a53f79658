"""Results of a batch request: its job's vectors become an output file, and its rejects an error file."""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import UUID

import numpy as np
import orjson
import structlog
from sqlalchemy import Connection, Engine, RowMapping

from pipeline.batch_api import files
from pipeline.batch_api.batches import end
from pipeline.core.errors import VectormillError
from pipeline.core.jobs import Job, Reason
from pipeline.core.requests import BatchState
from pipeline.db import batches, chunks, embeddings, items, jobs, rejects
from pipeline.db import files as kept_files
from pipeline.db.database import snapshot
from pipeline.infra.settings import Settings
from pipeline.jobs import status
from pipeline.sources.batch_lines import Fault

log = structlog.get_logger()

_PAGE = 1_000
_MOST_FAULTS = 100
#: Code and message in the error file for a line that wasn't processed.
_LEFT = {
    BatchState.CANCELLED: ("batch_cancelled", "the batch request was cancelled before this line's turn came."),
    BatchState.EXPIRED: ("batch_expired", "the completion window passed before this line's turn came."),
}


@dataclass(frozen=True, slots=True)
class _Results:
    """Final state, counts and errors of a batch request."""

    state: BatchState
    counts: Mapping[str, int]
    errors: list[dict[str, Any]]


def finish(engine: Engine, settings: Settings, batch_id: str) -> None:
    """Write a batch request's files, and end it. If its job runs again, leave it to wait for the job.

    Raises:
        VectormillError: there are more or fewer results than the job's receipt says.
        StorageRefused, StorageUnreachable: the files can't be kept.
    """
    with engine.begin() as connection:
        batches.begin_finalizing(connection, batch_id)
    with TemporaryFile() as output, TemporaryFile() as error:
        # One snapshot for all reads, since the job may go on for another batch request, or be purged.
        with snapshot(engine) as connection:
            batch = batches.by_id(connection, batch_id)
            job = jobs.by_id(connection, batch["job_id"]) if batch and batch["job_id"] else None
            waits = batch and job and not batch["ends_as"] and not job.state.ended
            found = _write(connection, batch, job, output, error) if batch and job and not waits else None
        if batch is None or batch["ended_at"] is not None:
            return
        if waits:
            with engine.begin() as connection:
                batches.wait_again(connection, batch_id)
        elif found is None:
            _end_without_job(engine, batch)
        elif _end_with(engine, settings, batch, found, {"output": output, "error": error}):
            log.info("batch_request_ended", batch=batch_id, job=str(batch["job_id"]), state=found.state.value)


def _end_without_job(engine: Engine, batch: RowMapping) -> None:
    gone = Fault("job_purged", f"its job {batch['job_id']} was purged before the results were written.")
    state = BatchState(batch["ends_as"]) if batch["job_id"] is None else BatchState.FAILED
    with engine.begin() as connection:
        end(connection, batch, state, errors=[asdict(gone)] if batch["job_id"] else ())


def _end_with(
    engine: Engine, settings: Settings, batch: RowMapping, found: _Results, written: Mapping[str, BinaryIO]
) -> bool:
    """Store the files, and end the batch request. Return False if another dispatcher was first."""
    kept: dict[str, str] = {}
    ended = False
    try:
        for kind, file in written.items():
            if file.tell():
                kept[f"{kind}_file_id"] = _keep(engine, settings, batch, kind, file)
        with engine.begin() as connection:
            ended = end(connection, batch, found.state, errors=found.errors, counts=found.counts, **kept)
    finally:
        if kept and not ended:
            with engine.begin() as connection:
                kept_files.expire(connection, list(kept.values()))
    return ended


def _keep(engine: Engine, settings: Settings, batch: RowMapping, kind: str, file: BinaryIO) -> str:
    file.seek(0)
    made = files.keep(
        engine,
        settings,
        batch["workspace_id"],
        purpose="batch_output",
        name=f"{batch['id']}_{kind}.jsonl",
        source=file,
        lives_seconds=batch["output_seconds"],
    )
    return str(made["id"])


def _write(connection: Connection, batch: RowMapping, job: Job, output: BinaryIO, error: BinaryIO) -> _Results | None:
    """Write a job's vectors and errors as lines of the two files. `None`: the job is being purged.

    Raises:
        VectormillError: the number of lines isn't the one in the receipt.
    """
    state = BatchState(batch["ends_as"] or job.state)
    receipt = status.receipt(connection, job.id)
    account, tokens = receipt.items, receipt.tokens
    completed, rejected = account.embedded + account.reused, account.rejected
    # A failed job has no output file, so that no next step takes its vectors for all. They can be read by the job's id.
    fails = state is BatchState.FAILED
    lines = (
        _write_lines(output, () if fails else _output(connection, batch, job.id)),
        _write_lines(error, _errors(connection, job.id, state)),
    )
    items, vectors, rejects = chunks.forgotten(connection, job.id)
    failed = account.submitted - completed - (items - vectors) if state in _LEFT else rejected - rejects
    wanted = (0 if fails else completed - vectors, failed)
    if lines != wanted:
        if job.texts_removed_at:
            return None
        raise VectormillError(
            f"job {job.id} has {lines[0]:,} output lines and {lines[1]:,} error lines, but its receipt says "
            f"{wanted[0]:,} and {wanted[1]:,}; verify the receipt."
        )
    counts = {
        "total": account.submitted,
        "completed": completed,
        "failed": rejected,
        "input_tokens": tokens.prompt + tokens.reused,
        "cached_tokens": tokens.reused,
    }
    return _Results(state, counts, _why_failed(connection, job, rejected) if fails else [])


def _why_failed(connection: Connection, job: Job, rejected: int) -> list[dict[str, Any]]:
    """Return the errors of a failed job: the reason, and the first rejected lines."""
    match job.reason:
        case Reason.TOO_MANY_REJECTS:
            told = f"{rejected:,} lines were rejected, max_rejects allows {job.max_rejects:,}; see the error file"
        case Reason.ALL_REJECTED:
            told = "every line was rejected; see the error file"
        case Reason.MODEL_CANNOT_LOAD:  # the job's message may hold paths of the model's files
            told = "no worker can load its model; ask the operator for the reason"
        case reason:
            told = job.message or (reason or "it failed").replace("_", " ")
    first = rejects.page_with_carried(connection, job.id, -1, _MOST_FAULTS - 1)
    lines = [Fault(row["code"], row["message"], (row["carried"] or {}).get("line")) for row in first]
    return [asdict(fault) for fault in (Fault(job.reason or "failed", f"{told}."), *lines)]


def _write_lines(file: BinaryIO, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write lines as JSON Lines, and return their number."""
    count = 0
    for line in lines:
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        count += 1
    return count


def _output(connection: Connection, batch: RowMapping, job_id: UUID) -> Iterator[Mapping[str, Any]]:
    """Yield an output line for each vector, in the order of the input."""
    for block in embeddings.stream(connection, job_id, _PAGE):
        for row in block:
            one: dict[str, Any] = {"object": "embedding", "index": 0, "embedding": _written(row.vector, row.carried)}
            body = {
                "object": "list",
                "data": [{**one, "truncated": True} if row.truncated else one],
                "model": batch["model"],
                "usage": {"prompt_tokens": row.tokens, "total_tokens": row.tokens},
            }
            response = {"status_code": 200, "request_id": f"req_{job_id.hex}_{row.index}", "body": body}
            yield {**_head(job_id, row.index, row.key), "response": response, "error": None}


def _written(vector: Any, carried: Mapping[str, Any] | None) -> Any:
    floats = np.ascontiguousarray(vector, dtype="<f4")
    if (carried or {}).get("encoding_format") == "base64":
        return base64.b64encode(floats.tobytes()).decode()
    return floats


def _errors(connection: Connection, job_id: UUID, state: BatchState) -> Iterator[Mapping[str, Any]]:
    """Yield an error line for each reject; after a cancellation or expiry, also for each item without a result."""
    for row in _pages(partial(rejects.page_with_carried, connection, job_id)):
        yield _error_line(job_id, row, row["code"], row["message"])
    if state in _LEFT:
        code, message = _LEFT[state]
        for row in _pages(partial(items.unsettled, connection, job_id)):
            yield _error_line(job_id, row, code, message)


def _pages(read: Callable[..., list[RowMapping]]) -> Iterator[RowMapping]:
    after = -1
    while page := read(after=after, limit=_PAGE):
        yield from page
        after = page[-1]["index"]


def _error_line(job_id: UUID, row: RowMapping, code: str, message: str) -> Mapping[str, Any]:
    line = (row["carried"] or {}).get("line")
    if line is not None and not message.startswith("line "):
        message = f"line {line:,}: {message}"
    error = {"code": code, "message": message, "line": line}
    return {**_head(job_id, row["index"], row["key"]), "response": None, "error": error}


def _head(job_id: UUID, index: int, key: str | None) -> dict[str, Any]:
    return {"id": f"batch_req_{job_id.hex}_{index}", "custom_id": key}
