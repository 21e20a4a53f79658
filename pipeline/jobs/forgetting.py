"""Forgetting of keys: a tombstone each at once, then their erasure from jobs and collections in bounded steps.

A step may be interrupted anywhere; the next run goes on. Jobs that haven't ended are waited for, since a worker may
hold an item in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from itertools import islice
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.errors import StorageRefused, StorageUnreachable, UnknownForget, UserError, Waiting
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.jobs import Job
from pipeline.core.options import JobOptions, UserTable
from pipeline.core.tombstones import digest
from pipeline.db import collections, forgets, jobs, syncs, user_table
from pipeline.db.collections import Collection
from pipeline.db.database import is_connection_lost, plain_reason
from pipeline.db.forgets import Forget
from pipeline.jobs import collection_files

_KEYS_AT_ONCE = 10_000
_COLLECTED_AT_ONCE = 1_000
#: Keys for which files are read at once.
_KEYS_IN_MEMORY = 200_000
_JOBS_AT_ONCE = 500
#: Items of a job that are looked through in one transaction.
_ITEMS_AT_ONCE = 200_000
_SHOWN_PLACES = 20
#: Why files can't be changed now, which holds up nothing else.
_REFUSALS = (StorageRefused, StorageUnreachable, Waiting)
#: Longest time between two looks at a job that hasn't ended.
_WAIT_SECONDS = 30.0
#: Longest time between two tries while a table or a storage refuses. Each reads the keys of all files.
_REFUSED_SECONDS = 120.0


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
    tables = list[str]()
    if found.finished_at and found.collection_id is None:
        tables = forgets.tables_of_jobs(connection, workspace_id, _SHOWN_PLACES)
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
        outputs=list(found.unseen[:_SHOWN_PLACES]),
        more_outputs=max(0, len(found.unseen) - _SHOWN_PLACES),
        tables=tables,
    )


def erase(engine: Engine, forget_id: UUID, erase_elsewhere: Callable[[int, Set[str]], None]) -> None:
    """Erase the keys of a request. `erase_elsewhere` erases keys of a workspace from what isn't a job's, nor a
    collection's.

    Raises:
        Waiting: a job that may still write hasn't ended, or a table of the user or a storage refuses. The request says
            which.
    """
    with engine.begin() as connection:
        found = forgets.by_id(connection, forget_id)
    if found is None or found.finished_at:
        return
    # Readers lose the keys at once, and again what the jobs that are waited for have published.
    _erase_from_collections(engine, found)
    waits, problem = _erase_from_jobs(engine, found)
    problem = _erase_from_collections(engine, found) or problem
    # A job whose storage refuses writes nothing any more.
    if not waits or problem:
        problem = _erase_from_files(engine, found, erase_elsewhere) or problem
    with engine.begin() as connection:
        forgets.note_problem(connection, forget_id, problem)
    if problem:
        raise Waiting(problem, most_seconds=_REFUSED_SECONDS)
    if waits:
        raise Waiting(f"job {waits[0]} hasn't ended", most_seconds=_WAIT_SECONDS)
    gone = _KEYS_AT_ONCE
    while gone == _KEYS_AT_ONCE:
        with engine.begin() as connection:
            gone = forgets.delete_keys(connection, forget_id, _KEYS_AT_ONCE)
    with engine.begin() as connection:
        forgets.finish(connection, forget_id)


def _erase_from_jobs(engine: Engine, forget: Forget) -> tuple[list[UUID], str | None]:
    """Erase the keys from the jobs that aren't looked through yet. Return those that aren't done, and why the files of
    one of them can't be changed."""
    problem, after, waits = None, forget.after_job, list[UUID]()

    def is_done(job_id: UUID) -> bool:
        nonlocal problem
        try:
            return _erase_from_job(engine, forget, job_id)
        except _REFUSALS as error:
            problem = str(error)
            return False

    waits = [job_id for job_id in forget.waits_for if not is_done(job_id)]
    while True:
        with engine.begin() as connection:
            forgets.advance(connection, forget.id, after, waits)
            page = forgets.jobs_after(connection, forget, after, _JOBS_AT_ONCE)
        for job_id in page:
            if not is_done(job_id):
                waits.append(job_id)
            after = job_id
            with engine.begin() as connection:
                forgets.advance(connection, forget.id, after, waits)
        if len(page) < _JOBS_AT_ONCE:
            return waits, problem


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
    if job and job.options.output:
        _erase_from_parts(engine, forget, job)
    return True


def _erase_from_parts(engine: Engine, forget: Forget, job: Job) -> None:
    """Erase the keys from a job's Parquet files, or note where they couldn't be found."""
    for keys in _pages(engine, forget):
        erased = sink_of(job.options).erase(engine, job, keys)
        with engine.begin() as connection:
            forgets.note_items(connection, forget.id, erased.unknown)
            if not erased.is_whole:
                forgets.note_unseen(connection, forget.id, str(job.options.output))


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


def _erase_from_files(engine: Engine, forget: Forget, erase_elsewhere: Callable[[int, Set[str]], None]) -> str | None:
    """Erase the keys from files that are no job's, where nothing puts them any more. Return why some can't be changed;
    the others are."""
    problem = None
    with engine.begin() as connection:
        versions = forgets.versions(connection, forget)
    for version in versions:
        try:
            for keys in _pages(engine, forget):
                collection_files.erase_keys(engine, version, keys)
        except _REFUSALS as error:
            problem = str(error)
    try:
        for keys in _pages(engine, forget) if forget.collection_id is None else ():
            erase_elsewhere(forget.workspace_id, keys)
    except _REFUSALS as error:
        problem = str(error)
    return problem


def _pages(engine: Engine, forget: Forget) -> Iterator[set[str]]:
    """Yield the keys of a request, for which files are read at once."""
    after: str | None = None
    while True:
        with engine.begin() as connection:
            page = forgets.keys_after(connection, forget.id, after, _KEYS_IN_MEMORY)
        if not page:
            return
        yield set(page)
        after = page[-1]


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
