"""Forgetting of keys: a tombstone each at once, then their erasure from jobs and collections in bounded steps.

A step may be interrupted anywhere; the next run goes on. Jobs that haven't ended are waited for, since a worker may
hold an item in memory.
"""

from collections.abc import Iterable
from itertools import islice
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from pipeline.core.errors import UnknownForget, UserError, Waiting
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.options import JobOptions, UserTable
from pipeline.core.tombstones import digest
from pipeline.db import collections, forgets, jobs, syncs, user_table
from pipeline.db.collections import Collection
from pipeline.db.database import is_connection_lost, plain_reason
from pipeline.db.forgets import Forget

_KEYS_AT_ONCE = 10_000
_COLLECTED_AT_ONCE = 1_000
_JOBS_AT_ONCE = 500
#: Items of a job that are looked through in one transaction.
_ITEMS_AT_ONCE = 200_000
_SHOWN_PLACES = 20
#: Longest time between two looks at a job that hasn't ended.
_WAIT_SECONDS = 30.0


def forget_keys(
    engine: Engine, workspace_id: int, keys: Iterable[str], *, by: str, collection: Collection | None
) -> UUID:
    """Request that keys of a workspace, or of one of its collections, are forgotten. Return the request's id.

    From then on nothing with such a key comes in; the dispatcher erases what is there. All keys are taken, or none.

    Raises:
        UserError: there is no key.
    """
    given, forget_id = iter(keys), uuid7()
    scope = collection.id if collection else None
    with engine.begin() as connection:
        secret = forgets.tombstone_key(connection, workspace_id)
        forgets.add(connection, forget_id, workspace_id, scope, by)
        taken = False
        while page := list(islice(given, _KEYS_AT_ONCE)):
            forgets.add_keys(connection, forget_id, page, [digest(secret, key, scope) for key in page])
            taken = True
        if not taken:
            raise UserError("no key: give at least one.", field="keys")
        forgets.begin(connection, forget_id)
    return forget_id


def allow_keys(engine: Engine, workspace_id: int, keys: Iterable[str], *, collection: Collection | None) -> int:
    """Let forgotten keys come in again. Return how many of them were forgotten."""
    given, lifted = iter(keys), 0
    scope = collection.id if collection else None
    with engine.begin() as connection:
        secret = forgets.tombstone_key(connection, workspace_id)
        while page := list(islice(given, _KEYS_AT_ONCE)):
            forgets.keep(connection, workspace_id, scope, page)
            lifted += forgets.lift(connection, workspace_id, [digest(secret, key, scope) for key in page])
    return lifted


def forget_status(connection: Connection, workspace_id: int, forget_id: UUID) -> ForgetStatus:
    """Return how far a request of a workspace is.

    Raises:
        UnknownForget: there is none.
    """
    found = forgets.by_id(connection, forget_id)
    if found is None or found.workspace_id != workspace_id:
        raise UnknownForget(f'no request "{forget_id}" to forget keys.')
    count, places, tables, files = 0, list[str](), list[str](), 0
    if found.finished_at and found.collection_id is None:
        count, places = forgets.files_of_jobs(connection, workspace_id, _SHOWN_PLACES)
        tables = forgets.tables_of_jobs(connection, workspace_id, _SHOWN_PLACES)
        files = forgets.batch_files(connection, workspace_id)
    return ForgetStatus(
        id=found.id,
        keys=found.keys,
        items=found.items,
        collected=found.collected,
        requested_by=found.requested_by,
        waits_for=found.waits_for[0] if found.waits_for else None,
        problem=found.problem,
        created_at=found.created_at,
        finished_at=found.finished_at,
        outputs=places,
        more_outputs=count - len(places),
        tables=tables,
        batch_files=files,
    )


def erase(engine: Engine, forget_id: UUID) -> None:
    """Erase the keys of a request.

    Raises:
        Waiting: a job that may still write hasn't ended, or a table of the user refuses. The request says which.
    """
    with engine.begin() as connection:
        found = forgets.by_id(connection, forget_id)
    if found is None or found.finished_at:
        return
    # Readers lose the keys at once, and again what the jobs that are waited for have published.
    _erase_from_collections(engine, found)
    waits = _erase_from_jobs(engine, found)
    problem = _erase_from_collections(engine, found)
    with engine.begin() as connection:
        forgets.note_problem(connection, forget_id, problem)
    if waits:
        raise Waiting(f"job {waits[0]} hasn't ended", most_seconds=_WAIT_SECONDS)
    if problem:
        raise Waiting(problem, most_seconds=_WAIT_SECONDS)
    gone = _KEYS_AT_ONCE
    while gone == _KEYS_AT_ONCE:
        with engine.begin() as connection:
            gone = forgets.delete_keys(connection, forget_id, _KEYS_AT_ONCE)
    with engine.begin() as connection:
        forgets.finish(connection, forget_id)


def _erase_from_jobs(engine: Engine, forget: Forget) -> list[UUID]:
    """Erase the keys from the jobs that aren't looked through yet. Return those that haven't ended."""
    after, waits = forget.after_job, [job for job in forget.waits_for if not _erase_from_job(engine, forget, job)]
    while True:
        with engine.begin() as connection:
            forgets.advance(connection, forget.id, after, waits)
            page = forgets.jobs_after(connection, forget, after, _JOBS_AT_ONCE)
        for job_id in page:
            if not _erase_from_job(engine, forget, job_id):
                waits.append(job_id)
            after = job_id
            with engine.begin() as connection:
                forgets.advance(connection, forget.id, after, waits)
        if len(page) < _JOBS_AT_ONCE:
            return waits


def _erase_from_job(engine: Engine, forget: Forget, job_id: UUID) -> bool:
    """Erase the keys from a job. Return False if it hasn't ended."""
    first, total = 0, 1
    while first < total:
        with engine.begin() as connection:
            job = jobs.lock(connection, job_id)  # nobody retries it meanwhile
            if job is None:
                return True  # it was purged
            if not job.state.ended:
                return False
            total = job.items_total or 0
            forgets.erase(connection, forget, job_id, first, _ITEMS_AT_ONCE, passages=job.options.splits)
        first += _ITEMS_AT_ONCE
    return True


def _erase_from_collections(engine: Engine, forget: Forget) -> str | None:
    """Erase the keys from all versions of collections. Return why a table of the user can't be changed; the others
    are."""
    problem = None
    with engine.begin() as connection:
        versions = forgets.versions(connection, forget)
    for version in versions:
        try:
            _erase_from_version(engine, forget, version)
        except UserError as error:
            problem = str(error)
        except DBAPIError as error:
            if is_connection_lost(error):
                raise
            problem = f"version {version} of a collection: {plain_reason(error)}"
    return problem


def _erase_from_version(engine: Engine, forget: Forget, version: int) -> None:
    key: str | None = None
    while True:
        with engine.begin() as connection:
            page = forgets.keys_after(connection, forget.id, key, _COLLECTED_AT_ONCE)
            if not page or not collections.exists(connection, version):
                return
            gone = syncs.remove_keys(connection, version, page, into=_table(connection, version))
            forgets.note_collected(connection, forget.id, gone)
        key = page[-1]


def _table(connection: Connection, version_id: int) -> UserTable | None:
    """Return the table of the user that a version has; None if it has none, or that is gone."""
    version = collections.of_version(connection, version_id)
    options = JobOptions.model_validate(dict(version.options)) if version else None
    if version is None or options is None or options.into is None or not user_table.exists(connection, options.into):
        return None
    return user_table.check(
        connection,
        options.into,
        key_column=options.columns.key,
        dimensions=version.dimensions,
        hnsw=False,
        passages=options.splits,
        deletes=True,
    )
