"""Restore check: finds and repairs what a restored or failed-over database has lost.

Claims don't depend on it: their tokens and commits are safe by themselves. It covers data outside of the database, and
data that the database has lost. See ops/runbooks/Restore.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC

from sqlalchemy import Engine, RowMapping

from pipeline.chunk_io.parquet_parts import names_of_parts
from pipeline.core.errors import StorageRefused, StorageUnreachable
from pipeline.core.jobs import JobState
from pipeline.db import jobs, outputs, restored
from pipeline.infra import storage


@dataclass(frozen=True, slots=True)
class Matter:
    """One line of the check's report."""

    name: str
    #: The finding.
    found: str
    #: Advice to a person; empty if nothing must be done, or `mend` does it.
    advice: str = ""
    #: Repairs the matter and returns a sentence on what it did; `None`: nothing can or need be done here.
    mend: Callable[[], str] | None = None


def check(engine: Engine) -> Iterator[Matter]:
    """Yield all findings in order. Nothing is changed until a `mend` is called."""
    for look in (_newest, _sequences, _claims, _parts, _files, _jobs, _keys):
        yield from look(engine)


def _newest(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        newest = restored.newest_moment(connection)
    when = f"{newest.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if newest else "nothing"
    yield Matter("newest", f"the newest job or usage that this database remembers: {when}")


def _sequences(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        behind = restored.sequences_behind(connection)
    if not behind:
        yield Matter("sequences", "no sequence is behind the ids in use")
        return

    def mend() -> str:
        with engine.begin() as connection:
            for sequence in behind:
                restored.advance(connection, sequence)
        return f"{len(behind)} sequences moved on"

    names = ", ".join(f"{sequence.table}.{sequence.column}" for sequence in behind)
    yield Matter("sequences", f"behind the ids in use: {names}", mend=mend)


def _claims(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        stale = restored.stale_claims(connection)
    if not stale:
        yield Matter("claims", "no chunk is held by a stale claim")
        return

    def mend() -> str:
        with engine.begin() as connection:
            return f"{restored.give_back_stale_claims(connection):,} chunks given back"

    yield Matter("claims", f"{stale:,} chunks are held by claims whose leases have run out", mend=mend)


def _parts(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        found = restored.jobs_with_parts(connection)
    whole = True
    for job in found:
        with engine.begin() as connection:
            recorded = {output.name for output in outputs.of_job(connection, job["id"])}
        try:
            seen = names_of_parts(job["folder"], job["id"])
        except (StorageRefused, StorageUnreachable) as error:
            whole = False
            yield Matter(
                "parts", f"{job['folder']} can't be read: {error}", "run this check on a machine that can read it."
            )
            continue
        if missing := sorted(recorded - seen):
            whole = False
            yield _missing_parts(engine, job, missing, sees_any=bool(seen))
    if whole:
        yield Matter("parts", f"all recorded Parquet parts of {len(found):,} jobs are there")


def _missing_parts(engine: Engine, job: RowMapping, missing: Sequence[str], *, sees_any: bool) -> Matter:
    found = f'job {job["id"]} ("{job["name"]}"): {len(missing):,} of its parts are missing below {job["folder"]}'
    if JobState(job["state"]).ended:
        advice = f"it is {job['state']}: put the files back from a backup, or submit it again."
        return Matter("parts", found, advice)
    if not sees_any:  # a folder of another machine, or one that isn't mounted, looks the same
        advice = "none is seen from here: run this where workers see the folder; if it is lost, cancel the job."
        return Matter("parts", found, advice)

    def mend() -> str:
        with engine.begin() as connection:
            now = jobs.lock(connection, job["id"])
            if now is None or now.state.ended:
                return "left alone: the job has ended meanwhile"
            return f"{restored.forget_parts(connection, job['id'], missing):,} chunks of job {job['id']} reopened"

    return Matter("parts", found, mend=mend)


def _files(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        kept = restored.kept_files(connection)
    try:
        missing = [file_id for file_id, uri in kept if storage.stat(uri) is None]
    except (StorageRefused, StorageUnreachable) as error:
        yield Matter(
            "files", f"the uploaded files can't be read: {error}", "run this check on a machine that can read them."
        )
        return
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        advice = "put VECTORMILL_FILES back from the backup of that time; batch requests on them fail."
        yield Matter("files", f"{len(missing):,} uploaded files have no bytes: {shown}", advice)
    else:
        yield Matter("files", "all uploaded files have their bytes")


def _jobs(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        found = restored.open_jobs(connection)
    if not found:
        yield Matter("jobs", "no job is open")
    for job in found:
        advice = "cancel it if it had ended since the backup: vectormill cancel " + str(job["id"])
        yield Matter("jobs", f'{job["id"]} ("{job["name"]}") is {job["state"]} and goes on', advice)


def _keys(engine: Engine) -> Iterator[Matter]:
    with engine.begin() as connection:
        live = restored.live_keys(connection)
    advice = "revoke again those that were revoked since the backup: vectormill keys list" if live else ""
    yield Matter("keys", f"{live:,} API keys are live", advice)
