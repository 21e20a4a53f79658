"""Erasure of forgotten keys from jobs and collections, in bounded steps.

A step may be interrupted anywhere; the next run goes on. Jobs that haven't ended are waited for, since a worker may
hold an item in memory.
"""

from collections.abc import Callable, Iterator, Set
from uuid import UUID

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.errors import UserError, VectormillError, Waiting
from pipeline.core.jobs import Job
from pipeline.core.options import JobOptions, UserTable
from pipeline.db import collections, forgets, jobs, syncs, user_table
from pipeline.db.database import held, is_connection_lost, plain_reason
from pipeline.db.forgets import Forget
from pipeline.jobs import collection_files

_KEYS_AT_ONCE = 10_000
_COLLECTED_AT_ONCE = 1_000
#: Keys for which files are read at once.
_KEYS_IN_MEMORY = 200_000
_JOBS_AT_ONCE = 500
#: Items of a job that are looked through in one transaction.
_ITEMS_AT_ONCE = 200_000
#: Longest time between two looks at a job that hasn't ended.
_WAIT_SECONDS = 30.0
#: Longest time between two tries while a table or a storage refuses. Each reads the keys of all files.
_REFUSED_SECONDS = 120.0

log = structlog.get_logger()


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
    # Two at once would write the same files.
    with held(engine, f"vectormill forget {found.workspace_id}") as still:
        if still is None:
            raise Waiting("another request of the workspace is worked on", most_seconds=_WAIT_SECONDS)
        _erase(engine, found, still, erase_elsewhere)


def _erase(
    engine: Engine, found: Forget, still: Callable[[], None], erase_elsewhere: Callable[[int, Set[str]], None]
) -> None:
    # Readers lose the keys at once, and again what the jobs that are waited for have published.
    _erase_from_collections(engine, found)
    waits, problem = _erase_from_jobs(engine, found, still)
    problem = _erase_from_collections(engine, found) or problem
    # A job whose storage refuses writes nothing any more.
    if not waits or problem:
        problem = _erase_from_files(engine, found, erase_elsewhere) or problem
    with engine.begin() as connection:
        forgets.note_problem(connection, found.id, problem)
    if problem:
        raise Waiting(problem, most_seconds=_REFUSED_SECONDS)
    if waits:
        raise Waiting(f"job {waits[0]} hasn't ended", most_seconds=_WAIT_SECONDS)
    gone = _KEYS_AT_ONCE
    while gone == _KEYS_AT_ONCE:
        with engine.begin() as connection:
            gone = forgets.delete_keys(connection, found.id, _KEYS_AT_ONCE)
    with engine.begin() as connection:
        forgets.finish(connection, found.id)


def _reason(what: str, error: Exception) -> str:
    """Return why something can't be erased, which holds up nothing else.

    Raises:
        sqlalchemy.exc.DBAPIError: the database is away.
    """
    if isinstance(error, DBAPIError) and is_connection_lost(error):
        raise error
    if isinstance(error, VectormillError):
        return str(error)
    log.warning("erasure_failed", what=what, error=type(error).__name__, message=str(error)[:500])
    return f"{what}: {type(error).__name__}; the dispatcher's log says more"


def _erase_from_jobs(engine: Engine, forget: Forget, still: Callable[[], None]) -> tuple[list[UUID], str | None]:
    """Erase the keys from the jobs that aren't looked through yet. Return those that aren't done, and why the files of
    one of them can't be changed."""
    problem, after, waits = None, forget.after_job, list[UUID]()

    def is_done(job_id: UUID) -> bool:
        nonlocal problem
        try:
            return _erase_from_job(engine, forget, job_id, still)
        except Waiting:  # it is tried again
            return False
        except Exception as error:  # noqa: BLE001 - whatever one job's files are, others go on
            problem = _reason(f"job {job_id}", error)
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


def _erase_from_job(engine: Engine, forget: Forget, job_id: UUID, still: Callable[[], None]) -> bool:
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
        still()
        first += _ITEMS_AT_ONCE
    if job and job.options.output:
        _erase_from_parts(engine, forget, job, still)
    return True


def _erase_from_parts(engine: Engine, forget: Forget, job: Job, still: Callable[[], None]) -> None:
    """Erase the keys from a job's Parquet files, or note where they couldn't be found."""
    for keys in _pages(engine, forget):
        erased = sink_of(job.options).erase(engine, job, keys, still)
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
        except Exception as error:  # noqa: BLE001 - whatever one version's files are, others go on
            problem = _reason(f"version {version} of a collection", error)
    try:
        for keys in _pages(engine, forget) if forget.collection_id is None else ():
            erase_elsewhere(forget.workspace_id, keys)
    except Exception as error:  # noqa: BLE001
        problem = _reason("files of batch requests", error)
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
