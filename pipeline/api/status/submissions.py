"""Submission of jobs at `POST /api/jobs`: from uploaded files, or from sources that the operator allows."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Generic, Protocol, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy import Engine
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from pipeline.api.dependencies import SECURITY, ask, caller_of, problems, scope_of, workspace_of
from pipeline.api.gateway.cache import Caller
from pipeline.api.transfers import Transfers
from pipeline.catalog.models import find_model
from pipeline.core.errors import InvalidPayload, SubmissionUndone, UnknownJob, UserError
from pipeline.core.job_status import JobStatus
from pipeline.core.options import Columns
from pipeline.infra.settings import Settings
from pipeline.infra.storage import is_remote
from pipeline.ingest.request import ELSEWHERE, JobRequest, default_name, read_sent, tell_model
from pipeline.ingest.submission import Submission, Submitted, planning
from pipeline.ingest.submit import submit
from pipeline.jobs import status
from pipeline.sources import Corpus
from pipeline.sources.upload import Upload, UploadedCorpus
from pipeline.webhooks import allowlist

router = APIRouter(prefix="/api/jobs", tags=["Jobs"])

#: Cost of a submission in turns: it looks through folders and files, with the processor time of so many other requests.
TURNS = 10
_MOST_FILES = 100
_MOST_FIELDS = 150
_MOST_FIELD_BYTES = 64 * 1024
_BLOCK_BYTES = 1024 * 1024
_MOST_ENDING = 20
_LISTS = ("carry",)


def schema_of(shape: type[BaseModel], unsent: Collection[str] = ()) -> dict[str, Any]:
    """Return the schema of a request, without the fields that aren't sent.

    Enums are inlined, because a part of the OpenAPI document can't refer to definitions of its own.
    """
    schema = shape.model_json_schema()
    enums = schema.pop("$defs", {})
    for name, field in schema["properties"].items():
        if reference := field.pop("$ref", None):
            schema["properties"][name] = {**enums[reference.rpartition("/")[2]], **field}
    for name in unsent & schema["properties"].keys():
        del schema["properties"][name]
    return schema


def body_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of a body: JSON of this schema, or a form with files and its other fields."""
    fields = {name: field for name, field in schema["properties"].items() if name not in ("sources", "by_reference")}
    upload = {
        "type": "object",
        "required": ["file", *(name for name in schema.get("required", ()) if name in fields)],
        "properties": {"file": _FILES, **fields},
    }
    content = {"multipart/form-data": {"schema": upload}, "application/json": {"schema": schema}}
    return {**SECURITY, "requestBody": {"required": True, "content": content}}


_FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": ".jsonl, .csv, .tsv or .parquet, text also as .gz or .zst; its name says which.",
}


@router.post(
    "",
    status_code=201,
    response_model=JobStatus,
    responses={
        200: {"model": JobStatus, "description": "The job that this idempotency key made before."},
        **problems(400, 404, 408, 413, 422),
    },
    openapi_extra=body_of(schema_of(JobRequest, ELSEWHERE)),
)
async def create_job(
    request: Request,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=200, description="Sending the same again attaches to the job made first."),
    ] = None,
    workspace: Annotated[
        str | None, Query(max_length=200, pattern="^[^\0]*$", description="For admins: workspace to make it in.")
    ] = None,
) -> Any:
    """Create a job from files that are uploaded as `multipart/form-data`, or, as JSON, from `sources` that the operator
    allows (`VECTORMILL_API_SOURCES`).

    The answer comes when all items are in the database. While an earlier request with the same idempotency key hasn't
    come so far, the answer is that request's job in the state `staging`.
    """
    owner, by = await owner_of(request, workspace)
    intake = intake_of_job(owner, by, request.app.state.settings, idempotency_key)
    return await answer(request, response, await receive_rows(request, owner, intake))


async def owner_of(request: Request, workspace: str | None) -> tuple[int, str]:
    """Return the workspace for which a request with rows is made, the caller's, or for an admin another one, and whose
    request it is."""
    caller = await caller_of(request, turns=TURNS)
    if unknown := set(request.query_params) - {"workspace"}:
        raise InvalidPayload(f"{min(unknown)}: send it in the body, not in the address.", param=min(unknown))
    if not workspace:
        return caller.workspace_id, submitter(caller)
    found = await ask(request, lambda connection: scope_of(connection, caller, workspace))
    assert found is not None, "only who names no workspace sees all"
    return found, submitter(caller)


def submitter(caller: Caller) -> str:
    """Return a caller as the history of a job names them."""
    return f"key {caller.key_id}"


async def answer(request: Request, response: Response, made: Submitted) -> JobStatus:
    """Return the status of a job that was made, or attached to, which answers 200."""
    try:
        job = await ask(request, lambda connection: status.job_status(connection, made.job_id))
    except UnknownJob as error:
        raise _undone() from error
    if made.attached:
        response.status_code = 200
    return job.model_copy(update={"notices": list(dict.fromkeys([*job.notices, *made.notices]))})


def _undone() -> SubmissionUndone:
    return SubmissionUndone(
        "An earlier request with this idempotency key has just failed; send this one again.", retry_after_seconds=1
    )


class RowsRequest(Protocol):
    """Request whose rows are uploaded or in sources."""

    @property
    def sources(self) -> list[str]:
        """Files, folders, globs or URIs."""


Wish = TypeVar("Wish", bound=RowsRequest)


@dataclass(frozen=True, slots=True)
class Intake(Generic[Wish]):
    """Treatment of a request and its rows."""

    read: Callable[[Mapping[str, Any]], Wish]
    columns: Callable[[Engine, Wish], Columns]
    #: Takes the default name of the job last.
    submit: Callable[[Engine, Wish, Corpus, str], Submitted]


def intake_of_job(owner: int, by: str, settings: Settings, idempotency_key: str | None) -> Intake[JobRequest]:
    """Return the treatment of a request for a new job of a workspace, submitted `by` somebody."""

    def act(engine: Engine, wish: JobRequest, corpus: Corpus, name: str) -> Submitted:
        return _submit(engine, owner, by, settings, wish, corpus, name, idempotency_key)

    return Intake(read_sent, lambda _, wish: wish.columns, act)


async def receive_rows(request: Request, owner: int, intake: Intake[Wish]) -> Submitted:
    """Read a request's fields, and submit its rows: an upload as `multipart/form-data`, or as JSON `sources` that the
    operator allows."""
    try:
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await _from_upload(request, owner, intake)
        return await _from_sources(request, owner, intake)
    except UnknownJob as error:
        raise _undone() from error


async def _from_sources(request: Request, owner: int, intake: Intake[Wish]) -> Submitted:
    settings: Settings = request.app.state.settings
    try:
        body = await request.app.state.transfers.body(request, workspace_of(request))
        fields = json.loads(body, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload("The body is neither JSON nor multipart/form-data.") from error
    if not isinstance(fields, dict):
        raise InvalidPayload("The body isn't a JSON object.")
    wish = intake.read(fields)
    if not wish.sources:
        raise InvalidPayload("sources: name files or URIs, or upload a file as multipart/form-data.", param="sources")
    for source in wish.sources:
        _must_be_allowed("sources", source, settings.api_sources, "VECTORMILL_API_SOURCES")

    def act(engine: Engine) -> Submitted:
        corpus = Corpus(wish.sources, intake.columns(engine, wish), settings.item_bytes)
        _must_stay_within(corpus, settings.api_sources)
        return intake.submit(engine, wish, corpus, default_name(wish.sources[0]))

    transfers: Transfers = request.app.state.transfers
    return await transfers.run(owner, act)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object.

    Raises:
        InvalidPayload: a field is given twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidPayload(f"{twice[:100]}: it is given twice.", param=twice[:100])
    return fields


async def _from_upload(request: Request, owner: int, intake: Intake[Wish]) -> Submitted:
    transfers: Transfers = request.app.state.transfers
    async with transfers.upload(owner):
        try:
            form = await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD_BYTES)
        except (MultiPartException, ValueError) as error:  # an unknown charset is a ValueError
            raise InvalidPayload("The body isn't the form that its content-type says.") from error
        try:
            fields = _fields(form)
            wish = intake.read(fields)
            if fields.get("by_reference") not in (None, "false", "False", "0") or wish.sources:
                raise InvalidPayload(
                    "sources: an upload takes neither sources nor by_reference; leave them out.", param="sources"
                )
            # A browser sends a nameless, empty part for a field in which no file was chosen.
            files = [part for _, part in form.multi_items() if isinstance(part, UploadFile) and part.filename]
            item_bytes = request.app.state.settings.item_bytes
            return await transfers.run(owner, lambda engine: _submit_upload(engine, item_bytes, wish, files, intake))
        finally:
            await form.close()


def _fields(form: FormData) -> dict[str, Any]:
    """Return a form's fields, as JSON would have them.

    Raises:
        InvalidPayload: a field is given twice.
    """
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name in _LISTS:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise InvalidPayload(f"{name}: it is given twice.", param=name)
        elif name == "labels":
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
            fields[name] = value
        else:
            fields[name] = value
    return fields


def _submit_upload(
    engine: Engine, item_bytes: int, wish: Wish, files: Sequence[UploadFile], intake: Intake[Wish]
) -> Submitted:
    if not files:
        raise InvalidPayload("file: the form has no file.", param="file")
    with TemporaryDirectory(prefix="vectormill-upload-") as kept:
        uploads = [_keep(file, Path(kept, str(number))) for number, file in enumerate(files)]
        corpus = UploadedCorpus(uploads, intake.columns(engine, wish), item_bytes)
        return intake.submit(engine, wish, corpus, default_name(uploads[0].name))


def _keep(file: UploadFile, folder: Path) -> Upload:
    """Save an upload under a name of ours, with its own name's endings, since they tell its format."""
    sent = (file.filename or "").encode(errors="replace").decode().replace("\\", "/").replace("\0", "")
    name = PurePosixPath(sent).name[-200:]
    endings = "".join(PurePosixPath(name).suffixes[-2:])
    if not endings.isascii() or len(endings) > _MOST_ENDING:
        endings = ""
    folder.mkdir()
    kept, digest = folder / f"upload{endings}", hashlib.sha256()
    with kept.open("xb") as target:
        while block := file.file.read(_BLOCK_BYTES):
            digest.update(block)
            target.write(block)
    return Upload(name or "file", kept, digest.hexdigest())


def _submit(
    engine: Engine,
    owner: int,
    by: str,
    settings: Settings,
    wish: JobRequest,
    corpus: Corpus,
    name: str,
    key: str | None,
) -> Submitted:
    if wish.output:
        must_be_allowed_output(wish.output, settings)
    if wish.webhook:
        allowlist.check(wish.webhook, settings.webhooks)
    with engine.begin() as connection:
        model = find_model(connection, owner, wish.model)
    tell_model(wish, model, corpus)
    return submit(
        engine,
        Submission(
            workspace_id=owner,
            model=model,
            corpus=corpus,
            planning=planning(settings),
            name=wish.name or name,
            options=wish,
            priority=wish.priority,
            labels=wish.labels,
            idempotency_key=key,
            submitted_by=by,
        ),
    )


def must_be_allowed_output(place: str, settings: Settings) -> None:
    """Check that an output named by a caller lies below a place that the operator allows.

    Raises:
        UserError: it doesn't, or it is a relative path.
    """
    _must_be_allowed("output", place, settings.api_outputs, "VECTORMILL_API_OUTPUTS")


def _must_be_allowed(field: str, place: str, allowed: Sequence[str], variable: str) -> None:
    """Check that a place named by a caller lies below one that the operator allows.

    Raises:
        UserError: it doesn't, or it is a relative path.
    """
    if place != "-" and not is_remote(place) and not Path(place).is_absolute():
        # Each process has a working folder of its own, so a relative path is ambiguous.
        raise UserError(f"{place} is relative; give an absolute path, such as /data/docs, or a URI.", field=field)
    # Dots after a link would lead out of the link's target. A dash is this process's own standard input.
    odd = place == "-" or {".", ".."} & set(place.split("/"))
    if odd or not any(_is_below(place, folder) for folder in allowed):
        # The message is the same whether or not the place exists, so that nobody can probe for files.
        raise UserError(f"{place} isn't below a place that this gateway's operator allows ({variable}).", field=field)


def _must_stay_within(corpus: Corpus, allowed: Sequence[str]) -> None:
    """Check the files that a folder or a pattern has found by their resolved paths, like those named directly.

    Raises:
        UserError: a link leads out of the allowed places.
    """
    if not all(file.uri and any(_is_below(file.uri, folder) for folder in allowed) for file in corpus.files):
        raise UserError(
            "a link in them leads out of the places that this gateway's operator allows (VECTORMILL_API_SOURCES).",
            field="sources",
        )


def _is_below(place: str, folder: str) -> bool:
    if is_remote(place) or is_remote(folder):
        return place.startswith(folder.rstrip("/") + "/") or place == folder
    # Files that a pattern matches are checked again when they are known.
    return Path(place).resolve().is_relative_to(Path(folder).resolve())
