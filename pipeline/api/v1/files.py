"""Files at `/v1/files`, which batch requests read and write."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import Connection, RowMapping
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from pipeline.api.dependencies import SECURITY, ask, caller_of
from pipeline.api.gateway.cache import Caller
from pipeline.api.transfers import Transfers
from pipeline.api.v1.embeddings import ERRORS
from pipeline.api.v1.pagination import After, Listed, Page, unknown_cursor
from pipeline.batch_api import files as keeping
from pipeline.core.errors import (
    InvalidPayload,
    NotFound,
    PayloadTooLarge,
    SourceChanged,
    StorageRefused,
    StorageUnreachable,
    UpstreamUnavailable,
)
from pipeline.db import files
from pipeline.infra.settings import Settings

log = structlog.get_logger()

router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI-compatible"])

_BLOCK_BYTES = 1024 * 1024
_MOST_FIELDS = 10
_MOST_NAME = 200
_SHORTEST_SECONDS, _LONGEST_SECONDS = 3_600, 2_592_000
_ID = "^[^\0]*$"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON lines, a request each."},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": _SHORTEST_SECONDS, "maximum": _LONGEST_SECONDS},
    },
}


class FileObject(Listed):
    """File that a batch request reads or writes."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(Page[FileObject]):
    """Page of files, ordered by their creation."""


class FileDeleted(BaseModel):
    """Confirmation that a file is deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class ExpiresAfter(BaseModel):
    """Expiry of a file, in seconds after its creation."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=_SHORTEST_SECONDS, le=_LONGEST_SECONDS)


@router.post(
    "/files",
    openapi_extra={
        **SECURITY,
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
    },
)
async def create_file(request: Request) -> FileObject:
    """Upload the input of a batch request."""
    caller = await caller_of(request)
    settings: Settings = request.app.state.settings
    transfers: Transfers = request.app.state.transfers
    async with transfers.upload(caller.workspace_id):
        return _shown(await _keep(request, caller, settings, transfers))


async def _keep(request: Request, caller: Caller, settings: Settings, transfers: Transfers) -> RowMapping:
    try:
        form = await request.form(max_files=1, max_fields=_MOST_FIELDS)
    except (MultiPartException, ValueError) as error:  # an unknown charset is a ValueError
        raise InvalidPayload("The body isn't the form that its content-type says.") from error
    try:
        file, lives_seconds = _read_form(form)
        if file.size is not None and file.size > settings.batch_bytes:
            raise PayloadTooLarge(
                f"The file has {file.size:,} bytes; at most {settings.batch_bytes:,} (VECTORMILL_BATCH_BYTES).",
                param="file",
            )
        name = (file.filename or "file").encode(errors="replace").decode().replace("\0", "")[-_MOST_NAME:]
        with _storage():
            return await transfers.run(
                caller.workspace_id,
                lambda engine: keeping.keep(
                    engine,
                    settings,
                    caller.workspace_id,
                    purpose="batch",
                    name=name,
                    source=file.file,
                    lives_seconds=lives_seconds,
                ),
            )
    finally:
        await form.close()


def _read_form(form: FormData) -> tuple[UploadFile, float | None]:
    purpose, file = form.get("purpose"), form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidPayload("file: the form has no file.", param="file")
    if purpose != "batch":
        raise InvalidPayload('purpose must be "batch".', param="purpose")
    seconds = form.get("expires_after[seconds]")
    if seconds is None:
        return file, None
    if not isinstance(seconds, str) or not seconds.isdecimal() or not seconds.isascii():
        raise InvalidPayload("expires_after[seconds] isn't a whole number.", param="expires_after")
    if not _SHORTEST_SECONDS <= int(seconds) <= _LONGEST_SECONDS:
        told = f"expires_after[seconds] must lie between {_SHORTEST_SECONDS:,} and {_LONGEST_SECONDS:,}."
        raise InvalidPayload(told, param="expires_after")
    return file, int(seconds)


@router.get("/files", openapi_extra=SECURITY)
async def list_files(
    request: Request,
    purpose: Annotated[str | None, Query(max_length=50, pattern=_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> FileList:
    """List your files, by default newest first."""
    caller = await caller_of(request)

    def read(connection: Connection) -> Sequence[RowMapping]:
        if after is not None and files.find(connection, caller.workspace_id, after) is None:
            raise unknown_cursor("file", after)
        return files.page(
            connection, caller.workspace_id, purpose=purpose, after=after, oldest_first=order == "asc", limit=limit + 1
        )

    return FileList.of([_shown(row) for row in await ask(request, read)], limit)


@router.get("/files/{file_id}", openapi_extra=SECURITY)
async def retrieve_file(request: Request, file_id: str) -> FileObject:
    """Retrieve a file's metadata."""
    return _shown(await find_file(request, await caller_of(request), file_id))


@router.delete("/files/{file_id}", openapi_extra=SECURITY)
async def delete_file(request: Request, file_id: str) -> FileDeleted:
    """Delete a file."""
    caller = await caller_of(request)
    await find_file(request, caller, file_id)
    transfers: Transfers = request.app.state.transfers
    with _storage():
        await transfers.run(caller.workspace_id, lambda engine: keeping.delete_file(engine, file_id))
    return FileDeleted(id=file_id)


@router.get(
    "/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "Its bytes."}},
    openapi_extra=SECURITY,
)
async def retrieve_content(request: Request, file_id: str) -> StreamingResponse:
    """Download a file's content."""
    caller = await caller_of(request)
    found = await find_file(request, caller, file_id)
    transfers: Transfers = request.app.state.transfers

    def blocks() -> Iterator[bytes]:
        with keeping.open_kept(found) as opened:
            while block := opened.read(_BLOCK_BYTES):
                yield block

    headers = {"content-length": str(found["bytes"])}
    try:
        with _storage():
            return await transfers.answer(
                caller.workspace_id, blocks, media_type="application/octet-stream", headers=headers
            )
    except SourceChanged as error:
        raise NotFound(f'the bytes of the file "{file_id}" are gone.') from error


@contextmanager
def _storage() -> Iterator[None]:
    """Report a storage failure as unavailable, without details: the location of files is the operator's business."""
    try:
        yield
    except (StorageRefused, StorageUnreachable) as error:
        log.warning("storage_failed", error=type(error).__name__, message=str(error))
        told = "The gateway's storage of files can't be used for now; try again."
        raise UpstreamUnavailable(told, retry_after_seconds=10) from error


async def find_file(request: Request, caller: Caller, file_id: str) -> RowMapping:
    """Return a file that the caller sees.

    Raises:
        NotFound: the caller sees no such file.
    """
    found: RowMapping | None = None
    if "\0" not in file_id:  # Postgres allows no NUL in a text
        found = await ask(request, lambda connection: files.find(connection, caller.workspace_id, file_id))
    if found is None:
        raise NotFound("no such file.", param="file_id")
    return found


def _shown(row: RowMapping) -> FileObject:
    return FileObject(
        id=row["id"],
        bytes=row["bytes"],
        created_at=int(row["created_at"].timestamp()),
        expires_at=int(row["expires_at"].timestamp()) if row["expires_at"] else None,
        filename=row["name"],
        purpose=row["purpose"],
    )
