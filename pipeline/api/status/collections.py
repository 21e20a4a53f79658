"""Collections at `/api/collections`: made, shown, synced, upgraded and dropped."""

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, Engine

from pipeline.api.dependencies import SECURITY, ask, caller_of, described, problems, read_body, scope_or_own
from pipeline.api.gateway.cache import Caller
from pipeline.api.paths import as_sent
from pipeline.api.status.submissions import (
    Intake,
    answer,
    body_of,
    must_be_allowed_output,
    owner_of,
    receive_rows,
    schema_of,
)
from pipeline.catalog.models import find_model
from pipeline.core.collection_status import CollectionList, CollectionStatus, Comparison, SyncList
from pipeline.core.errors import CollectionBusy, UserError
from pipeline.core.job_status import JobStatus
from pipeline.core.jobs import JobState
from pipeline.core.options import Address, Columns, JobOptions, Word
from pipeline.db import jobs, syncs
from pipeline.infra.settings import Settings
from pipeline.ingest.collections import create_collection, upgrade_collection
from pipeline.ingest.request import read_fields
from pipeline.ingest.submission import Submitted, planning
from pipeline.ingest.sync import SyncRequest, columns_of, submission_of, sync_collection
from pipeline.jobs import collections, comparison
from pipeline.sources import Corpus
from pipeline.webhooks import allowlist

router = APIRouter(prefix="/api/collections", responses=problems(400, 404), tags=["Collections"])


#: Workspace of a collection.
Of = Annotated[
    str | None,
    Query(
        max_length=200,
        pattern="^[^\0]*$",
        description="For admins: its workspace. Default: the key's own.",
    ),
]


class NewCollection(JobOptions):
    """Request for a collection: its name, its model, and the options with which its texts are embedded."""

    name: Word = Field(description="Letters, digits, dashes and underscores.")
    model: Word | None = Field(
        default=None, description="The model, by name or alias. Default: the only one that you may use."
    )
    expect_every_seconds: float | None = Field(
        default=None, gt=0, le=1e9, description="Longest time between two syncs that is no cause for alarm."
    )


class Upgrade(BaseModel):
    """Request for a collection's next version."""

    model_config = ConfigDict(extra="forbid")

    model: Word = Field(description="The model of the next version, by name or alias.")
    dimensions: int | None = Field(default=None, gt=0, le=2**31 - 1, description="Of its vectors, as of a job.")
    output: Address | None = Field(
        default=None, description="The version's own empty folder or URI, if the current one has one."
    )


class Swap(BaseModel):
    """Request that gives readers a collection's next version."""

    model_config = ConfigDict(extra="forbid")

    keep_seconds: float = Field(
        default=collections.KEEP.total_seconds(),
        gt=0,
        le=1e9,
        description="Time in which a swap can be undone; meanwhile syncs go to both versions.",
    )


#: Options of jobs that collections don't have.
_NOT_OF_COLLECTIONS = ("unique_keys", "by_reference", "into", "hnsw", "webhook", "reuse")


async def _change(request: Request, caller: Caller, workspace: str | None, act: Any) -> Any:
    """Run `act`, which may wait for others, with a transaction and the workspace that a request is about."""

    def run(engine: Engine) -> Any:
        with engine.begin() as connection:
            return act(connection, scope_or_own(connection, caller, workspace))

    return await request.app.state.transfers.run(caller.workspace_id, run)


async def _of(request: Request, workspace: str | None, act: Any) -> Any:
    """Run `act` with the workspace that a request is about."""
    caller = await caller_of(request)
    return await ask(request, lambda connection: act(connection, scope_or_own(connection, caller, workspace)))


def _check_free(connection: Connection, owner: int, name: str, idempotency_key: str | None) -> None:
    """Refuse a sync before its rows are sent, if another one goes on."""
    found = collections.find_collection(connection, owner, name)
    running = syncs.running(connection, found.version_id)
    job = jobs.by_id(connection, running) if running else None
    if job and job.state is not JobState.STAGING and (not idempotency_key or job.idempotency_key != idempotency_key):
        raise CollectionBusy(found.name, job.id)


@router.get("", openapi_extra=SECURITY)
async def list_collections(request: Request, workspace: Of = None) -> CollectionList:
    """List the collections of your workspace, by name."""
    return CollectionList(data=await _of(request, workspace, collections.list_collections))


@router.post(
    "",
    status_code=201,
    responses=problems(413),
    openapi_extra={
        **SECURITY,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema_of(NewCollection, _NOT_OF_COLLECTIONS)}},
        },
    },
)
async def make_collection(request: Request, workspace: Of = None) -> CollectionStatus:
    """Create an empty collection, and the view that shows its vectors. Syncs fill it."""
    caller = await caller_of(request)
    wish = await read_body(request, NewCollection)
    every = None if wish.expect_every_seconds is None else timedelta(seconds=wish.expect_every_seconds)
    own = {"name", "model", "expect_every_seconds"}
    options = read_fields(JobOptions, wish.model_dump(exclude=own, exclude_unset=True))
    if refused := next((name for name in ("into", "hnsw") if getattr(options, name)), None):
        raise UserError("only a command at the database takes it; leave it out.", field=refused)
    if options.output:
        must_be_allowed_output(options.output, request.app.state.settings)

    def act(connection: Connection) -> CollectionStatus:
        scope = scope_or_own(connection, caller, workspace)
        made = create_collection(connection, scope, wish.name, model=wish.model, options=options, expect_every=every)
        return collections.collection_status(connection, made)

    return await ask(request, act)


@router.get("/{collection}", openapi_extra=SECURITY)
async def show_collection(request: Request, collection: str, workspace: Of = None) -> CollectionStatus:
    """Show a collection: its model, options, size and last sync."""

    def act(connection: Connection, scope: int) -> CollectionStatus:
        found = collections.find_collection(connection, scope, as_sent(collection))
        return collections.collection_status(connection, found)

    return await _of(request, workspace, act)


@router.delete("/{collection}", status_code=204, responses=problems(409), openapi_extra=SECURITY)
async def drop_collection(request: Request, collection: str, workspace: Of = None) -> None:
    """Drop a collection with its view, vectors and history. Its jobs stay."""
    caller = await caller_of(request)

    def act(connection: Connection, scope: int) -> None:
        collections.drop_collection(connection, collections.find_collection(connection, scope, as_sent(collection)))

    await _change(request, caller, workspace, act)


@router.post("/{collection}/upgrade", status_code=201, openapi_extra=described(Upgrade))
async def upgrade(request: Request, collection: str, workspace: Of = None) -> CollectionStatus:
    """Begin a next version with another model. The next whole sync fills it, beside the version that readers see."""
    caller = await caller_of(request)
    wish = await read_body(request, Upgrade)
    if wish.output:
        must_be_allowed_output(wish.output, request.app.state.settings)

    def act(connection: Connection, scope: int) -> CollectionStatus:
        name = as_sent(collection)
        upgrade_collection(connection, scope, name, model=wish.model, dimensions=wish.dimensions, output=wish.output)
        return collections.collection_status(connection, collections.find_collection(connection, scope, name))

    return await _change(request, caller, workspace, act)


@router.delete("/{collection}/upgrade", status_code=204, openapi_extra=SECURITY)
async def abandon_upgrade(request: Request, collection: str, workspace: Of = None) -> None:
    """Abandon an upgrade: the next version goes."""
    caller = await caller_of(request)

    def act(connection: Connection, scope: int) -> None:
        collections.abandon_upgrade(connection, collections.find_collection(connection, scope, as_sent(collection)))

    await _change(request, caller, workspace, act)


@router.post("/{collection}/compact", status_code=202, openapi_extra=SECURITY)
async def compact(request: Request, collection: str, workspace: Of = None) -> CollectionStatus:
    """Let the Parquet files be written anew as one full set, without what later ones replace. Earlier sets go."""
    caller = await caller_of(request)

    def act(connection: Connection, scope: int) -> CollectionStatus:
        found = collections.find_collection(connection, scope, as_sent(collection))
        collections.compact(connection, found)
        return collections.collection_status(connection, found)

    return await _change(request, caller, workspace, act)


@router.get("/{collection}/comparison", openapi_extra=SECURITY)
async def compare(request: Request, collection: str, workspace: Of = None) -> Comparison:
    """Compare the next version with the one that readers see: size, cost, and what is near to keys drawn at random."""
    caller = await caller_of(request)

    def act(connection: Connection, scope: int) -> Comparison:
        return comparison.compare(connection, collections.find_collection(connection, scope, as_sent(collection)))

    return await _change(request, caller, workspace, act)


@router.post("/{collection}/swap", responses=problems(409), openapi_extra=described(Swap))
async def swap(request: Request, collection: str, workspace: Of = None) -> CollectionStatus:
    """Give readers the next version: the view, searches, and the model that the collection's name stands for in
    `/v1/embeddings` change in one transaction."""
    caller = await caller_of(request)
    wish = await read_body(request, Swap)

    def act(connection: Connection, scope: int) -> CollectionStatus:
        found = collections.find_collection(connection, scope, as_sent(collection))
        collections.swap(connection, found, keep=timedelta(seconds=wish.keep_seconds))
        return collections.collection_status(connection, collections.find_collection(connection, scope, found.name))

    return await _change(request, caller, workspace, act)


@router.post("/{collection}/swap-back", openapi_extra=SECURITY)
async def swap_back(request: Request, collection: str, workspace: Of = None) -> CollectionStatus:
    """Undo a swap: readers see the previous version again, and the current one becomes the next."""
    caller = await caller_of(request)

    def act(connection: Connection, scope: int) -> CollectionStatus:
        found = collections.find_collection(connection, scope, as_sent(collection))
        collections.swap_back(connection, found)
        return collections.collection_status(connection, collections.find_collection(connection, scope, found.name))

    return await _change(request, caller, workspace, act)


@router.get("/{collection}/syncs", openapi_extra=SECURITY)
async def list_syncs(
    request: Request,
    collection: str,
    workspace: Of = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> SyncList:
    """List a collection's newest syncs, newest first, with what each changed."""

    def act(connection: Connection, scope: int) -> SyncList:
        found = collections.find_collection(connection, scope, as_sent(collection))
        return SyncList(data=collections.history(connection, found, limit))

    return await _of(request, workspace, act)


@router.post(
    "/{collection}/syncs",
    status_code=201,
    response_model=JobStatus,
    responses={
        200: {"model": JobStatus, "description": "The job that this idempotency key made before."},
        **problems(400, 404, 408, 409, 413, 422),
    },
    openapi_extra=body_of(schema_of(SyncRequest)),
)
async def sync(
    request: Request,
    response: Response,
    collection: str,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=200, description="Sending the same again attaches to the job made first."),
    ] = None,
    workspace: Of = None,
) -> Any:
    """Bring a collection up to files that are uploaded as `multipart/form-data`, or, as JSON, to `sources` that the
    operator allows (`VECTORMILL_API_SOURCES`).

    The answer comes when the changes are in the database. While another sync of the collection goes on, it is 409.
    """
    owner, by = await owner_of(request, workspace)
    settings: Settings = request.app.state.settings
    name = as_sent(collection)
    await ask(request, lambda connection: _check_free(connection, owner, name, idempotency_key))
    intake = intake_of_sync(owner, name, by, settings, idempotency_key)
    return await answer(request, response, await receive_rows(request, owner, intake))


def intake_of_sync(
    owner: int, name: str, by: str, settings: Settings, idempotency_key: str | None
) -> Intake[SyncRequest]:
    """Return the treatment of a request for a sync of a workspace's collection, submitted `by` somebody."""

    def read(fields: Any) -> SyncRequest:
        return read_fields(SyncRequest, fields)

    def columns(engine: Engine, wish: SyncRequest) -> Columns:
        with engine.begin() as connection:
            return columns_of(collections.find_collection(connection, owner, name), wish)

    def act(engine: Engine, wish: SyncRequest, corpus: Corpus, _: str) -> Submitted:
        if wish.webhook:
            allowlist.check(wish.webhook, settings.webhooks)
        with engine.begin() as connection:
            found = collections.find_collection(connection, owner, name)
            model = find_model(connection, owner, found.model)
        submission = submission_of(found, model, wish, corpus, planning(settings), idempotency_key, submitted_by=by)
        return sync_collection(engine, submission, wish, queue=False)

    return Intake(read, columns, act)
