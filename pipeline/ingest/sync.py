"""Syncs from the doors: a collection brought up to a source, in each of its versions."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from sqlalchemy import Engine

from pipeline.catalog.models import find_model
from pipeline.core.collections import OnDuplicateKey, SyncOptions
from pipeline.core.errors import CollectionBusy, UserError, VectormillError
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.core.options import MOST_COLUMNS, Address, Columns, JobOptions, Word
from pipeline.db import collections, jobs, syncs
from pipeline.db.collections import Collection
from pipeline.ingest.request import MOST_SOURCES, read_fields
from pipeline.ingest.submission import Planning, Submission, Submitted
from pipeline.ingest.submit import submit
from pipeline.jobs import control
from pipeline.sources import Corpus
from pipeline.sources.query import QueryCorpus
from pipeline.sources.removed_keys import RemovedKeys

#: Sources that can be read once for each version.
SyncSource = Corpus | QueryCorpus | RemovedKeys
_POLL_SECONDS = 1.0


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
    by_reference: bool = Field(
        default=False,
        description="Workers read what has changed from the files themselves; their texts don't go to Postgres.",
    )
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
    of_source = ("max_rejects", "delimiter", "quote", "by_reference", "webhook")
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
    corpus: SyncSource,
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
    engine: Engine,
    submission: Submission,
    wish: SyncRequest,
    *,
    queue: bool = True,
    on_wait: Callable[[UUID], None] = lambda _: None,
) -> Submitted:
    """Submit a sync, as soon as the collection's earlier sync has ended, and the same of its other versions.

    Args:
        engine: of the database.
        submission: one that `submission_of` made.
        wish: the request of which it was made.
        queue: wait for the earlier sync, instead of refusing.
        on_wait: called once with the job of each sync that is waited for.

    Raises:
        CollectionBusy: without `queue`, another sync goes on.
        As `pipeline.ingest.submit.submit`.
    """
    done = _submit_in_turn(engine, submission, queue=queue, on_wait=on_wait)
    told = sync_other_versions(engine, submission, wish, done.job_id, queue=queue, on_wait=on_wait)
    return replace(done, notices=[*done.notices, *told])


def _submit_in_turn(
    engine: Engine,
    submission: Submission,
    *,
    queue: bool,
    on_wait: Callable[[UUID], None],
    still: Callable[[], bool] = lambda: True,
) -> Submitted:
    """Submit a sync of a version once its earlier sync has ended, while that is `still` wanted."""
    told = None
    while True:
        try:
            return submit(engine, submission)
        except CollectionBusy as busy:
            if not queue or not still():
                raise
            if busy.job_id != told:
                on_wait(busy.job_id)
                told = busy.job_id
            time.sleep(_POLL_SECONDS)


def sync_other_versions(
    engine: Engine,
    submission: Submission,
    wish: SyncRequest,
    leader: UUID,
    *,
    queue: bool = False,
    on_wait: Callable[[UUID], None] = lambda _: None,
) -> list[str]:
    """Submit the same sync as the job `leader` for each other version of its collection. Return what became of it, in
    sentences for a person: a version that misses a sync takes none of the others along.

    A version whose earlier sync hasn't ended misses this one, or with `queue` waits for it, as `sync_collection` does.
    """
    assert submission.collection
    told = []
    for version in _others(engine, submission.collection, leader):
        which = f"the {version.state} version (model {version.model})"
        try:
            other = _of_version(engine, submission, wish, version, leader)
            still = partial(_is_latest, engine, leader)
            done = _submit_in_turn(engine, other, queue=queue, on_wait=on_wait, still=still)
        except VectormillError as error:
            told.append(f"{which} misses this sync: {error}")
        else:
            told.append(f"{which} is synced by job {done.job_id}")
    return told


#: States of a sync that the other versions get, too.
_GOES_ON = (JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.COMPLETED)


def _others(engine: Engine, collection: Collection, leader: UUID) -> list[Collection]:
    """Return the versions other than that of a sync, if it goes on or has completed."""
    with engine.begin() as connection:
        job = jobs.by_id(connection, leader)
        own = syncs.version_of(connection, leader)
        versions = collections.versions(connection, collection.id)
    if job is None or job.state not in _GOES_ON:
        return []
    return [version for version in versions.values() if version.version_id != own]


def _is_latest(engine: Engine, job_id: UUID) -> bool:
    with engine.begin() as connection:
        return syncs.is_latest(connection, job_id)


def _of_version(
    engine: Engine, submission: Submission, wish: SyncRequest, version: Collection, leader: UUID
) -> Submission:
    """Return the submission of the same sync for another version.

    Raises:
        UserError: a later sync has begun, whose rows are newer; or the version's model can't be used.
    """
    corpus, key = submission.corpus, submission.idempotency_key
    assert isinstance(corpus, SyncSource)
    with engine.begin() as connection:
        model = find_model(connection, version.workspace_id, version.model)
    if not _is_latest(engine, leader) and not (key and _is_known(engine, version, _key_of(key, version))):
        raise UserError(f"a later sync than {leader} has begun.")
    return submission_of(
        version,
        model,
        wish.model_copy(
            update={
                "name": f"{submission.name} ({model.name})",
                "webhook": None,
                # Whether so many keys may go is decided; a version that missed a sync may have more to remove.
                "max_removed": "" if wish.delta else "100%",
            }
        ),
        corpus.again(),
        submission.planning,
        _key_of(key, version) if key else None,
        submitted_by=submission.submitted_by,
        query=submission.query,
        beside=leader,
    )


def _key_of(key: str, version: Collection) -> str:
    return f"{key} (version {version.version_id})"


def _is_known(engine: Engine, version: Collection, key: str) -> bool:
    with engine.begin() as connection:
        return jobs.by_idempotency_key(connection, version.workspace_id, key) is not None
