"""Jobs at `/api/jobs`: status, control, receipts, chunks, rejects and results."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, Engine

from pipeline.api.dependencies import (
    SECURITY,
    Workspace,
    ask,
    ask_of_job,
    caller_of,
    described,
    problems,
    read_body,
    scope_of,
    workspace_of,
)
from pipeline.api.status.schemas import Chunk, ChunkPage, JobPage, Priority, RejectPage, Retried
from pipeline.api.transfers import Transfers
from pipeline.api.v1.pagination import unknown_cursor
from pipeline.core.chunks import ChunkState, RejectCode
from pipeline.core.errors import InvalidPayload
from pipeline.core.job_status import JobStatus, Receipt
from pipeline.core.jobs import JobState
from pipeline.db import chunks, jobs, rejects
from pipeline.jobs import control, results, status
from pipeline.jobs.verification import verified_receipt

router = APIRouter(prefix="/api/jobs", responses=problems(400, 404), tags=["Jobs"])

#: Rejects that a stream reads in one query.
_PAGE = 1_000
_TEXT = "^[^\0]*$"


@router.get("", openapi_extra=SECURITY)
async def list_jobs(
    request: Request,
    state: Annotated[list[JobState], Query(description="May be repeated.")] = [],  # noqa: B006 - FastAPI copies it
    model: Annotated[str | None, Query(max_length=200, pattern=_TEXT)] = None,
    name: Annotated[str | None, Query(max_length=200, pattern=_TEXT, description="A part of the name.")] = None,
    label: Annotated[list[str], Query(max_length=20, description="K=V; may be repeated.")] = [],  # noqa: B006
    workspace: Workspace = None,
    after: Annotated[UUID | None, Query(description="`after` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobPage:
    """List your jobs, newest first; an admin's key sees everybody's."""
    caller = await caller_of(request)
    labels = dict(_label(pair) for pair in label)

    def run(connection: Connection) -> list[JobStatus]:
        scope = scope_of(connection, caller, workspace)
        wanted = {"states": state, "model": model, "name": name, "labels": labels}
        before = jobs.by_id(connection, after) if after else None
        if after and (before is None or scope not in (None, before.workspace_id)):
            raise unknown_cursor("job", str(after))
        return status.list_jobs(connection, scope, **wanted, before=after, limit=limit + 1)

    found = await ask(request, run)
    page = found[:limit]
    more = len(found) > limit
    return JobPage(data=page, has_more=more, after=page[-1].id if more else None)


def _label(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals or "\0" in pair:
        raise InvalidPayload(f'label "{pair}": write it as key=value.', param="label")
    return key, value


@router.get("/{job}", openapi_extra=SECURITY)
async def get_job(request: Request, job: str, workspace: Workspace = None) -> JobStatus:
    """Return a job's status. The job is found by its id, a unique prefix of it, or its name."""
    return await ask_of_job(request, job, status.job_status, workspace)


@router.post("/{job}/cancel", responses=problems(409), openapi_extra=SECURITY)
async def cancel_job(request: Request, job: str, workspace: Workspace = None) -> JobStatus:
    """Cancel a job. Vectors that are committed stay; the receipt counts the rest as cancelled."""
    return await ask_of_job(request, job, _then_status(control.cancel), workspace, changes_ended=False)


@router.post("/{job}/pause", responses=problems(409), openapi_extra=SECURITY)
async def pause_job(request: Request, job: str, workspace: Workspace = None) -> JobStatus:
    """Pause a job: running chunks finish, no others start."""
    return await ask_of_job(request, job, _then_status(control.pause), workspace, changes_ended=False)


@router.post("/{job}/resume", responses=problems(409), openapi_extra=SECURITY)
async def resume_job(request: Request, job: str, workspace: Workspace = None) -> JobStatus:
    """Resume a paused job."""
    return await ask_of_job(request, job, _then_status(control.resume), workspace, changes_ended=False)


@router.post("/{job}/priority", responses=problems(409), openapi_extra=described(Priority))
async def prioritise_job(request: Request, job: str, workspace: Workspace = None) -> JobStatus:
    """Change a job's priority, which puts it before or behind others from its next chunk on."""
    caller = await caller_of(request)
    priority = (await read_body(request, Priority)).priority

    def act(connection: Connection, job_id: UUID) -> None:
        control.prioritise(connection, job_id, priority)

    return await ask_of_job(request, job, _then_status(act), workspace, changes_ended=False, caller=caller)


@router.post("/{job}/retry", responses=problems(409), openapi_extra=SECURITY)
async def retry_job(request: Request, job: str, workspace: Workspace = None) -> Retried:
    """Retry a job's items that may succeed: rejects with a retryable code, and what a failed job left undone."""

    def act(connection: Connection, job_id: UUID) -> Retried:
        reopened = control.retry(connection, job_id)
        return Retried(reopened_chunks=reopened, job=status.sum_up(connection, job_id))

    return await ask_of_job(request, job, act, workspace, changes_ended=True)


def _then_status(act: Callable[[Connection, UUID], Any]) -> Callable[[Connection, UUID], JobStatus]:
    def run(connection: Connection, job_id: UUID) -> JobStatus:
        act(connection, job_id)
        return status.job_status(connection, job_id)

    return run


@router.get("/{job}/receipt", openapi_extra=SECURITY, response_model_exclude_none=True)
async def get_receipt(
    request: Request,
    job: str,
    verify: Annotated[bool, Query(description="Count the rows themselves, one by one; slow.")] = False,
    workspace: Workspace = None,
) -> Receipt:
    """Return a job's receipt: items in = embedded + reused + unchanged + rejected + cancelled."""

    if not verify:
        return await ask_of_job(request, job, status.receipt, workspace)
    job_id = await ask_of_job(request, job, lambda _, found: found, workspace)

    def count(engine: Engine) -> Receipt:
        with engine.begin() as connection:
            return verified_receipt(connection, job_id)

    transfers: Transfers = request.app.state.transfers
    return await transfers.run(workspace_of(request), count)


@router.get("/{job}/chunks", openapi_extra=SECURITY)
async def list_chunks(
    request: Request,
    job: str,
    state: Annotated[list[ChunkState], Query(description="May be repeated.")] = [],  # noqa: B006
    after: Annotated[int, Query(ge=-1, lt=2**63, description="`after` of the previous page.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    workspace: Workspace = None,
) -> ChunkPage:
    """List a job's chunks in the order of their items."""

    def act(connection: Connection, job_id: UUID) -> list[Any]:
        return chunks.page(connection, job_id, states=state, after=after, limit=limit + 1)

    found = await ask_of_job(request, job, act, workspace)
    page = [Chunk.model_validate(each, from_attributes=True) for each in found[:limit]]
    more = len(found) > limit
    return ChunkPage(data=page, has_more=more, after=page[-1].first_index if more else None)


@router.get(
    "/{job}/rejects",
    response_model=RejectPage,
    openapi_extra=SECURITY,
    responses={200: {"content": {"application/x-ndjson": {}, "text/csv": {}}}},
)
async def list_rejects(
    request: Request,
    job: str,
    code: Annotated[RejectCode | None, Query(description="Only with this code.")] = None,
    format: Annotated[  # noqa: A002 - what callers write
        Literal["json", "jsonl", "csv"], Query(description="jsonl and csv stream all of them.")
    ] = "json",
    after: Annotated[int, Query(ge=-1, lt=2**63, description="`after` of the previous page.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Size of a page.")] = 100,
    workspace: Workspace = None,
) -> Any:
    """List a job's items that could not be embedded, each with its code and the reason."""
    if format == "json":

        def act(connection: Connection, job_id: UUID) -> tuple[list[dict[str, Any]], dict[str, int] | None]:
            page = rejects.page(connection, job_id, after, limit + 1, code)
            # Counted for the first page only, since the query reads every reject.
            return page, rejects.count_by_code(connection, job_id) if after < 0 else None

        found, counts = await ask_of_job(request, job, act, workspace)
        more = len(found) > limit
        last = found[limit - 1]["index"] if more else None
        return {"data": found[:limit], "counts": counts, "has_more": more, "after": last}
    job_id = await ask_of_job(request, job, lambda _, found: found, workspace)
    transfers: Transfers = request.app.state.transfers
    encode = _as_csv if format == "csv" else _as_json_lines

    def pieces() -> Iterator[bytes]:
        return encode(_all_rejects(transfers.engine, job_id, after, code))

    return await transfers.answer(workspace_of(request), pieces, **_as_file(f"{job_id}-rejects", format))


def _all_rejects(engine: Engine, job_id: UUID, after: int, code: str | None) -> Iterator[list[dict[str, Any]]]:
    """Yield a job's rejects page by page, each read in a transaction of its own."""
    while True:
        with engine.begin() as connection:
            page = rejects.page(connection, job_id, after, _PAGE, code)
        if page:
            yield page
        if len(page) < _PAGE:
            return
        after = page[-1]["index"]


def _as_json_lines(pages: Iterator[list[dict[str, Any]]]) -> Iterator[bytes]:
    for page in pages:
        yield b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in page)


def _as_csv(pages: Iterator[list[dict[str, Any]]]) -> Iterator[bytes]:
    names = ("index", "key", "code", "message")
    head = _csv_rows([names])
    for page in pages:  # the header goes with the first page, since an error before it can still be answered
        yield head + _csv_rows([[_harmless(row[name]) for name in names] for row in page])
        head = b""
    if head:
        yield head


def _csv_rows(rows: Sequence[Sequence[Any]]) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def _harmless(value: Any) -> Any:
    """Escape a text that a spreadsheet would take for a formula."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


@router.get(
    "/{job}/results",
    response_class=Response,
    openapi_extra=SECURITY,
    responses={
        200: {
            "description": "index, key, embedding, tokens, truncated, of passages also passage, start and stop, and "
            "carried columns.",
            "content": {"application/vnd.apache.parquet": {}, "application/x-ndjson": {}},
        }
    },
)
async def get_results(
    request: Request,
    job: str,
    format: Annotated[Literal["parquet", "jsonl"], Query()] = "parquet",  # noqa: A002 - what callers write
    first: Annotated[int, Query(ge=0, lt=2**63, description="From this index on.")] = 0,
    end: Annotated[int | None, Query(ge=0, lt=2**63, description="Up to this index, exclusive. Default: all.")] = None,
    workspace: Workspace = None,
) -> Response:
    """Download a job's vectors in index order. The file is streamed while it is made."""
    job_id = await ask_of_job(request, job, lambda _, found: found, workspace)
    until = results.LAST_INDEX if end is None else end
    transfers: Transfers = request.app.state.transfers

    def pieces() -> Iterator[bytes]:
        return results.stream(transfers.engine, job_id, format, first, until)

    return await transfers.answer(workspace_of(request), pieces, **_as_file(str(job_id), format))


_MEDIA_TYPES: Mapping[str, str] = {
    "parquet": "application/vnd.apache.parquet",
    "jsonl": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
}


def _as_file(stem: str, kind: str) -> dict[str, Any]:
    """Return the media type and headers of an answer that is a file."""
    headers = {"content-disposition": f'attachment; filename="{stem}.{kind}"'}
    return {"media_type": _MEDIA_TYPES[kind], "headers": headers}
