"""Collections from the doors: made, found, and brought up to a source by a sync."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from sqlalchemy import Connection, Engine

from pipeline.catalog.models import DEFAULT_WORKSPACE, find_model, vector_space_of
from pipeline.core.collections import OnDuplicateKey, SyncOptions
from pipeline.core.errors import CollectionBusy, UserError
from pipeline.core.models import Model
from pipeline.core.options import MOST_COLUMNS, Address, Columns, JobOptions, Word
from pipeline.db import collections, workspaces
from pipeline.db.collections import Collection
from pipeline.ingest.request import MOST_SOURCES, read_fields
from pipeline.ingest.submission import Planning, Submission, Submitted
from pipeline.ingest.submit import check_lengths, submit
from pipeline.jobs import control
from pipeline.jobs.collections import find_collection
from pipeline.sources import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
#: Names that tables of the schema have or will have.
_RESERVED = re.compile(r"(items|embeddings|passages|rejects|collection|alembic|vectormill)_.*", re.IGNORECASE)
_MOST_COLLECTIONS = 1_000
#: Longest name of a view in Postgres, in bytes.
_MOST_NAME = 63
#: Columns of each collection's view, beside those of passages.
_VIEW_COLUMNS = ("key", "vector")
_POLL_SECONDS = 1.0


def create_collection(
    connection: Connection,
    workspace_id: int,
    name: str,
    *,
    model: str,
    options: JobOptions,
    expect_every: timedelta | None = None,
) -> Collection:
    """Create an empty collection, with its tables and the view that shows it.

    Raises:
        UserError: the name can't be used or is taken, or an option doesn't fit.
        UnknownModel: the workspace may not use such a model.
    """
    found = find_model(connection, workspace_id, model)
    check_lengths(options, found)
    _check_options(options)
    if expect_every is not None and expect_every <= timedelta():
        raise UserError("give a time such as 24h.", field="expect_every")
    view = _view_of(workspaces.name_of(connection, workspace_id), name)
    if collections.count(connection, workspace_id) >= _MOST_COLLECTIONS:
        raise UserError(f"a workspace has at most {_MOST_COLLECTIONS:,} collections; drop one.")
    reserved = _RESERVED.fullmatch(view) or collections.relation_exists(connection, view)
    if reserved and collections.by_name(connection, workspace_id, name) is None:
        raise UserError("vectormill has a table of this name; choose another.", field="name", given=f'"{name}"')
    made = collections.create(
        connection,
        workspace_id,
        name=name,
        view=view,
        expect_every=expect_every,
        model=found.name,
        vector_space_id=vector_space_of(
            connection, found, dimensions=options.dimensions, max_item_tokens=options.max_item_tokens
        ),
        options=options.model_dump(mode="json", exclude_defaults=True),
    )
    if not made:
        raise UserError("there is a collection of this name already.", field="name", given=f'"{name}"')
    return find_collection(connection, workspace_id, name)


def _view_of(workspace: str, name: str) -> str:
    view = name if workspace == DEFAULT_WORKSPACE else f"{workspace}.{name}"
    if not _NAME.fullmatch(name) or len(view.encode()) > _MOST_NAME:
        raise UserError(
            f"use letters, digits, dashes and underscores, at most {_MOST_NAME - len(view) + len(name)} of them.",
            field="name",
            given=f'"{name[:80]}"',
        )
    return view


def _check_options(options: JobOptions) -> None:
    control.reject_limit(options.max_rejects, 0)
    for field in ("unique_keys", "by_reference", "output", "into", "hnsw", "webhook"):
        if getattr(options, field):
            raise UserError("a collection has no such option.", field=field)
    if long := next((column for column in options.carry if len(column.encode()) > _MOST_NAME), None):
        raise UserError(f'"{long[:80]}" has more than {_MOST_NAME} bytes, so no view can have it.', field="carry")
    if taken := next((column for column in options.carry if column in _VIEW_COLUMNS), None):
        raise UserError(f'the collection has a column "{taken}" already; rename it.', field="carry")


class SyncRequest(BaseModel):
    """Request for a sync of a collection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[Address] = Field(
        default=[],
        max_length=MOST_SOURCES,
        description="Files, folders, globs or URIs that the operator allows, for a sync without an upload.",
    )
    delta: bool = Field(default=False, description="The source names only what changed; other keys stay.")
    removed_column: Word | None = Field(
        default=None, description="Of a delta: the column that is true in rows whose key goes."
    )
    max_removed: str = Field(
        default="",
        max_length=30,
        description="Fail, and remove nothing, if more keys than this are missing in the source, such as `50` or "
        "`2.5%`. Default: 20 % from 100 keys on.",
    )
    keep_rejected: bool = Field(
        default=False, description="Keep the old vectors of keys whose row is rejected now, such as by a null text."
    )
    atomic: bool = Field(default=False, description="Show readers nothing of the sync before its end.")
    on_duplicate_key: OnDuplicateKey = Field(
        default=OnDuplicateKey.LAST, description="The row that counts of several with one key: last, first or reject."
    )
    max_rejects: str | None = Field(
        default=None, max_length=30, description="As of a job. Default: as of the collection."
    )
    delimiter: str | None = Field(default=None, description="Delimiter of .csv and .tsv fields, or `tab`.")
    quote: str | None = Field(default=None, description="Quote character of .csv and .tsv, or `none`.")
    name: Word | None = Field(default=None, description="The job's name. Default: the collection's.")
    labels: dict[Word, Word] = Field(default={}, max_length=MOST_COLUMNS, description="Kept with job and usage.")
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first.")
    webhook: Address | None = Field(
        default=None, description="URL to notify when the job ends; the operator must allow it."
    )

    @field_validator("removed_column")
    @classmethod
    def _check_removed_column(cls, column: str | None, info: ValidationInfo) -> str | None:
        if column is not None and not info.data.get("delta"):
            raise ValueError("it is for a delta; a whole sync removes the keys that its source lacks")
        return column

    @field_validator("max_removed")
    @classmethod
    def _check_max_removed(cls, limit: str, info: ValidationInfo) -> str:
        if limit and info.data.get("delta"):
            raise ValueError("a delta removes only what it names; leave it out")
        return limit


def job_options(collection: Collection, wish: SyncRequest) -> JobOptions:
    """Return the options of a sync's job: those of the collection, and of the request what concerns the source."""
    of_source = ("max_rejects", "delimiter", "quote", "webhook")
    given = {name: value for name in of_source if (value := getattr(wish, name)) is not None}
    return read_fields(JobOptions, {**collection.options, **given})


def columns_of(collection: Collection, wish: SyncRequest) -> Columns:
    """Return the columns that a sync reads."""
    columns = replace(job_options(collection, wish).columns, key_required=True)
    if wish.removed_column is None:
        return columns
    if wish.removed_column in (*columns.carry, columns.key):
        raise UserError("that column is the key, or carried; name another.", field="removed_column")
    return replace(columns, carry=(*columns.carry, wish.removed_column))


def submission_of(
    collection: Collection,
    model: Model,
    wish: SyncRequest,
    corpus: Source,
    planning: Planning,
    idempotency_key: str | None = None,
    **more: Any,
) -> Submission:
    """Return the submission of a sync; `more` are fields of `Submission`."""
    control.removal_limit(wish.max_removed, 0)
    return Submission(
        workspace_id=collection.workspace_id,
        model=model,
        corpus=corpus,
        planning=planning,
        name=wish.name or collection.name,
        options=job_options(collection, wish),
        priority=wish.priority,
        labels=wish.labels,
        idempotency_key=idempotency_key,
        collection=collection,
        sync=SyncOptions(
            version_id=collection.version_id,
            whole=not wish.delta,
            max_removed=wish.max_removed,
            keep_rejected=wish.keep_rejected,
            atomic=wish.atomic,
            on_duplicate_key=wish.on_duplicate_key,
            removed_column=wish.removed_column,
        ),
        **more,
    )


def sync_collection(
    engine: Engine, submission: Submission, *, queue: bool = True, on_wait: Callable[[UUID], None] = lambda _: None
) -> Submitted:
    """Submit a sync, as soon as the collection's earlier sync has ended.

    Args:
        engine: of the database.
        submission: one that `submission_of` made.
        queue: wait for the earlier sync, instead of refusing.
        on_wait: called once with the job of each sync that is waited for.

    Raises:
        CollectionBusy: without `queue`, another sync goes on.
        As `pipeline.ingest.submit.submit`.
    """
    told = None
    while True:
        try:
            return submit(engine, submission)
        except CollectionBusy as busy:
            if not queue:
                raise
            if busy.job_id != told:
                on_wait(busy.job_id)
                told = busy.job_id
            time.sleep(_POLL_SECONDS)
