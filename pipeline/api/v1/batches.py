"""Batch requests at `/v1/batches`, in the wire shape of OpenAI's API."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from sqlalchemy import Connection, RowMapping

from pipeline.api.dependencies import SECURITY, ask, caller_of, described, read_body
from pipeline.api.v1.embeddings import ERRORS
from pipeline.api.v1.files import ExpiresAfter, find_file
from pipeline.api.v1.pagination import After, Listed, Page, unknown_cursor
from pipeline.batch_api import batches as steps
from pipeline.batch_api.files import new_id
from pipeline.core.errors import InvalidPayload, NotFound, UnknownJob, UserError
from pipeline.core.requests import BatchState
from pipeline.db import batches
from pipeline.jobs import control, status
from pipeline.sources.batch_lines import ENDPOINT

router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI-compatible"])

_WINDOW = re.compile("([1-9][0-9]{0,3})([hd])", re.ASCII)
_UNIT_SECONDS = {"h": 3_600, "d": 86_400}
_LONGEST_WINDOW_SECONDS = 30 * 86_400
_NO_NUL = "^[^\0]*$"
_Key = Annotated[str, Field(min_length=1, max_length=64, pattern=_NO_NUL)]
_Value = Annotated[str, Field(max_length=512, pattern=_NO_NUL)]


def _as_option(given: object) -> object:
    """Return a limit as text, as the command line's option has it."""
    if given is None:
        return ""
    return str(given) if type(given) is int else given


_Limit = Annotated[
    str,
    BeforeValidator(_as_option),
    Field(max_length=30, pattern=_NO_NUL),
    WithJsonSchema({"anyOf": [{"type": "string", "maxLength": 30}, {"type": "integer"}, {"type": "null"}]}),
]


class NewBatch(BaseModel):
    """Batch request to create. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: str = Field(max_length=100, pattern=_NO_NUL, description="A file uploaded for the purpose batch.")
    endpoint: Literal["/v1/embeddings"]
    completion_window: str = Field(max_length=10, description="24h, or another number of h or d, up to 30d.")
    metadata: dict[_Key, _Value] | None = Field(
        default=None, max_length=16, description="Stored with the batch request and the job."
    )
    output_expires_after: ExpiresAfter | None = Field(default=None, description="Expiry of output and error file.")
    max_rejects: _Limit = Field(
        default="",
        description="Fail if more lines than this are rejected, such as 50 or `2.5%`. Default: 10 % from 100 lines on.",
    )


class BatchError(BaseModel):
    """Reason for a batch request's failure."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(BaseModel):
    """Reasons for a batch request's failure, with the lines at fault; at most a hundred."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Progress of a batch request, in lines."""

    total: int
    completed: int
    failed: int


class InputTokens(BaseModel):
    """Details of the input tokens: `cached_tokens` are of texts whose vectors existed already."""

    cached_tokens: int


class OutputTokens(BaseModel):
    """Details of the output tokens: embeddings have none."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the lines that have vectors."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = 0
    output_tokens_details: OutputTokens = OutputTokens()
    total_tokens: int


class Batch(Listed):
    """Batch request and its progress."""

    object: Literal["batch"] = "batch"
    endpoint: Literal["/v1/embeddings"] = "/v1/embeddings"
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchState
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None = Field(description="Null until it has ended.")
    metadata: dict[str, str] | None
    job_id: str | None = Field(description="Id of the batch request's job in the status API.")


class BatchList(Page[Batch]):
    """Page of batch requests, newest first."""


@router.post("/batches", openapi_extra=described(NewBatch))
async def create_batch(request: Request) -> Batch:
    """Embed the lines of an uploaded file. Sending the same content again attaches to the job that it made before."""
    caller = await caller_of(request)
    wish = await read_body(request, NewBatch)
    window_seconds = _seconds_of(wish.completion_window)
    try:
        control.reject_limit(wish.max_rejects, 0)
    except UserError as error:
        raise InvalidPayload(str(error), param="max_rejects") from error
    file = await find_file(request, caller, wish.input_file_id)
    if file["purpose"] != "batch":
        raise InvalidPayload('input_file_id names a file whose purpose isn\'t "batch".', param="input_file_id")
    row = {
        "id": new_id("batch_"),
        "workspace_id": caller.workspace_id,
        "endpoint": ENDPOINT,
        "completion_window": wish.completion_window,
        "input_file_id": wish.input_file_id,
        "metadata": wish.metadata,
        "max_rejects": wish.max_rejects,
        "output_seconds": wish.output_expires_after.seconds if wish.output_expires_after else None,
    }

    def make(connection: Connection) -> Batch:
        return _shown(connection, batches.insert(connection, row, window_seconds))

    return await ask(request, make)


def _seconds_of(window: str) -> float:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_WINDOW_SECONDS:
        raise InvalidPayload("completion_window: write it as 24h or 7d, up to 30d.", param="completion_window")
    return seconds


@router.get("/batches", openapi_extra=SECURITY)
async def list_batches(
    request: Request,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """List your batch requests, newest first."""
    caller = await caller_of(request)

    def read(connection: Connection) -> BatchList:
        if after is not None and batches.find(connection, caller.workspace_id, after) is None:
            raise unknown_cursor("batch request", after)
        found = batches.page(connection, caller.workspace_id, after, limit + 1)
        return BatchList.of([_shown(connection, row) for row in found], limit)

    return await ask(request, read)


@router.get("/batches/{batch_id}", openapi_extra=SECURITY)
async def retrieve_batch(request: Request, batch_id: str) -> Batch:
    """Retrieve a batch request and its progress."""
    return await _with_batch(request, batch_id, _shown)


@router.post("/batches/{batch_id}/cancel", openapi_extra=SECURITY)
async def cancel_batch(request: Request, batch_id: str) -> Batch:
    """Cancel a batch request. Finished lines are in its output file. A batch request that has ended stays as it is."""

    def cancel(connection: Connection, row: RowMapping) -> Batch:
        steps.let_go(connection, row["id"], BatchState.CANCELLED)
        now = batches.by_id(connection, row["id"])
        assert now
        return _shown(connection, now)

    return await _with_batch(request, batch_id, cancel)


async def _with_batch(request: Request, batch_id: str, act: Any) -> Batch:
    caller = await caller_of(request)

    def run(connection: Connection) -> Batch:
        row = None if "\0" in batch_id else batches.find(connection, caller.workspace_id, batch_id)
        if row is None:
            raise NotFound("no such batch request.", param="batch_id")
        found: Batch = act(connection, row)
        return found

    return await ask(request, run)


def _shown(connection: Connection, row: RowMapping) -> Batch:
    state, ended_at = BatchState(row["state"]), _moment(row["ended_at"])
    return Batch(
        id=row["id"],
        model=row["model"],
        errors=BatchErrors(data=row["errors"]) if row["errors"] else None,
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        status=state,
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        created_at=int(row["created_at"].timestamp()),
        in_progress_at=_moment(row["in_progress_at"]),
        expires_at=_moment(row["expires_at"]),
        finalizing_at=_moment(row["finalizing_at"]),
        completed_at=ended_at if state is BatchState.COMPLETED else None,
        failed_at=ended_at if state is BatchState.FAILED else None,
        expired_at=ended_at if state is BatchState.EXPIRED else None,
        cancelling_at=_moment(row["cancelling_at"]),
        cancelled_at=ended_at if state is BatchState.CANCELLED else None,
        request_counts=RequestCounts(**(row["counts"] or _counts_now(connection, row))),
        usage=_usage(row["counts"] or {}),
        metadata=row["metadata"],
        job_id=str(row["job_id"]) if row["job_id"] else None,
    )


def _usage(counts: Mapping[str, int]) -> BatchUsage | None:
    if "input_tokens" not in counts:
        return None
    total, cached = counts["input_tokens"], counts["cached_tokens"]
    return BatchUsage(input_tokens=total, input_tokens_details=InputTokens(cached_tokens=cached), total_tokens=total)


def _moment(when: datetime | None) -> int | None:
    return int(when.timestamp()) if when else None


def _counts_now(connection: Connection, row: RowMapping) -> dict[str, int]:
    try:
        items = status.job_status(connection, row["job_id"]).items if row["job_id"] else None
    except UnknownJob:  # it has been purged
        items = None
    if items is None:
        return {"total": 0, "completed": 0, "failed": 0}
    return {
        "total": items.total,
        "completed": items.embedded + items.reused,
        "failed": items.rejected,
    }
