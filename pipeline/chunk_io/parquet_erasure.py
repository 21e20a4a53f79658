"""Erasure of keys from a job's Parquet files: parts that hold one are written anew, and take the old ones' places."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import orjson
import pyarrow.compute as pc
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.parquet_data_set import CLAIM, MANIFEST, vacate
from pipeline.chunk_io.parquet_parts import PART, open_part, part_name, staging_of, visible_names, without_keys
from pipeline.core.errors import SourceChanged, Waiting
from pipeline.core.jobs import Job
from pipeline.db import jobs, outputs
from pipeline.db.database import ping
from pipeline.db.outputs import Output
from pipeline.infra import storage


class Erased(NamedTuple):
    """Result of an erasure of keys from a job's files."""

    #: Items that nobody has counted as erased.
    unknown: int
    #: False: a file can't be found.
    is_whole: bool


def erase_keys(folder: str, engine: Engine, job: Job, keys: Set[str], still: Callable[[], object]) -> Erased:
    """Write the parts anew that have one of the keys, one at a time, in staging; then let them take the places of
    those that they replace. What an earlier run has left is mended, too. Nothing else in the folder is touched, as
    others may have written to it.
    """
    with engine.begin() as connection:
        written = outputs.of_job(connection, job.id)
    there, missing, unknown = list[Output](), set[str](), 0
    for output in written:
        still()
        try:
            kept, items = _erase_from(folder, engine, job, output, keys)
        except SourceChanged:
            missing.add(output.name)
        else:
            there.append(kept)
            unknown += items
    staging = staging_of(folder, job.id)
    seen = (set(visible_names(folder)), set(storage.names_below(staging)) - {CLAIM})
    with _ended(engine, job) as connection:  # so that no worker adds a part
        counted = {output.name for output in outputs.of_job(connection, job.id)}
        if counted != missing | {output.name for output in there}:
            raise Waiting(f"the parts of job {job.id} have changed meanwhile")
        for act in _replacements(folder, job, there, counted, *seen):
            ping(connection)  # keeps the transaction, or shows that it has ended
            act()
    return Erased(unknown, is_whole=not missing)


def _erase_from(folder: str, engine: Engine, job: Job, output: Output, keys: Set[str]) -> tuple[Output, int]:
    """Return the part that counts now, this one if it has none of the keys, and the number of items that nobody has
    counted as erased.

    Raises:
        SourceChanged: it is gone.
        Waiting: the job is tried again.
    """
    with open_part(folder, job.id, output) as file:
        left = without_keys(file, keys)
    if left is None:
        return output, 0
    name = part_name(output.chunk_id, output.fence, uuid4(), output.part)
    made = dataclasses.replace(output, name=name, rows=left.rows, bytes=len(left.data))
    staged = storage.join(staging_of(folder, job.id), name)
    storage.write(staged, left.data)
    erased = pc.unique(left.gone["index"]).to_pylist()
    unknown = len(erased) if job.options.by_reference else 0  # others are erased from `items`
    passages = len(left.gone) if job.options.splits else 0
    try:
        with _ended(engine, job) as connection:
            if not outputs.replace(connection, job.id, output, made, erased, passages=passages, unknown=unknown):
                raise Waiting(f"the parts of job {job.id} have changed meanwhile")
    except Waiting:
        storage.delete(staged)
        raise
    return made, unknown


def _replacements(
    folder: str, job: Job, there: Sequence[Output], counted: Set[str], visible: Set[str], staged: Set[str]
) -> Iterator[Callable[[], None]]:
    """Yield what is to be done so that the parts that are there take the places of those that they replace: moves,
    the manifest, and deletions of what doesn't count."""
    staging = staging_of(folder, job.id)
    by_commit = {(_commit_of(output), output.part): output for output in there}
    replaced = {name for name in visible - counted if _commit_named(name) in by_commit}
    moved = {by_commit[_commit_named(name)].name for name in replaced} & staged
    for name in moved:
        yield partial(storage.move, storage.join(staging, name), storage.join(folder, name))
    if manifest := _manifest_of(folder, job.id):
        files = [_as_listed(by_commit.get(_commit_named(file["name"])), file) for file in manifest["files"]]
        if files != manifest["files"]:
            changed = {**manifest, "files": files, "rows": sum(file["rows"] for file in files)}
            made = orjson.dumps(changed, option=orjson.OPT_INDENT_2)
            yield partial(storage.write, storage.join(folder, MANIFEST), made)
    for name in replaced:
        yield partial(storage.delete, storage.join(folder, name))
    for name in staged - counted:
        yield partial(storage.delete, storage.join(staging, name))
    if counted and counted <= visible | moved:  # as of a job that has completed
        yield partial(vacate, folder, job.id)


def _manifest_of(folder: str, job_id: UUID) -> Any:
    """Return the manifest in the folder; None if there is none, or it is another job's."""
    if (found := storage.stat(storage.join(folder, MANIFEST))) is None:
        return None
    with storage.open_file(found.uri, found.etag) as file:
        manifest = orjson.loads(file.read())
    return manifest if manifest.get("job") == str(job_id) else None


@contextmanager
def _ended(engine: Engine, job: Job) -> Iterator[Connection]:
    """Open a short transaction in which a job that has ended isn't tried again.

    Raises:
        Waiting: it is.
    """
    with engine.begin() as connection:
        now = jobs.lock(connection, job.id)
        if now is None or not now.state.ended:
            raise Waiting(f"job {job.id} is tried again")
        yield connection


def _commit_of(output: Output) -> str:
    return f"part-{output.chunk_id}-{output.fence}"


def _commit_named(name: str) -> tuple[str, int]:
    """Return the commit that a part is of, as beginning of its name and number; of another file nothing like it."""
    found = PART.fullmatch(name)
    return (found[1], int(found[2] or 0)) if found else ("", 0)


def _as_listed(output: Output | None, file: dict[str, Any]) -> dict[str, Any]:
    return {"name": output.name, "rows": output.rows, "bytes": output.bytes} if output else file
