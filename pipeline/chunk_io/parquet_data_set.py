"""Data set of Parquet files that a job's parts become when it completes. Every step is idempotent."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import orjson
import structlog

from pipeline.chunk_io.parquet_parts import PART, STAGING, staging_of, visible_names
from pipeline.core.errors import UserError
from pipeline.db.outputs import Output
from pipeline.infra import storage

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
#: File by which a job occupies its folder.
CLAIM = "_job.json"
#: Concurrent moves of objects, as each takes a round trip or two.
_MOVES = 16

log = structlog.get_logger()


def occupy(folder: str, job_id: UUID) -> None:
    """Occupy an empty folder for a job's output by writing a file to it, which proves that it can be written.

    Raises:
        UserError: the folder isn't empty.
        StorageRefused, StorageUnreachable: it can't be written.
    """
    ours = f"{STAGING}/{job_id}/"
    for name in storage.names_below(folder):
        if not name.startswith(ours):
            raise UserError(f"{name} is there already; give an empty folder.", field="output", given=folder)
    storage.write(storage.join(staging_of(folder, job_id), CLAIM), orjson.dumps({"job": str(job_id)}))


def vacate(folder: str, job_id: UUID) -> None:
    """Delete a job's files below `_staging`."""
    storage.delete_folder(staging_of(folder, job_id))


def make_data_set(
    folder: str,
    job_id: UUID,
    parts: Sequence[Output],
    about: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Turn a completed job's parts into a data set, and remove all other parts from the folder.

    It is idempotent, also after an interruption at any point. `check` is called before anything is deleted, and raises
    if the parts aren't the job's any more.

    Raises:
        StorageRefused, StorageUnreachable: it isn't finished.
    """
    check()
    _remove_strays(folder, {output.name for output in parts})

    def promote(output: Output) -> None:
        storage.move(storage.join(staging_of(folder, job_id), output.name), storage.join(folder, output.name))

    with ThreadPoolExecutor(_MOVES) as pool:
        for _ in pool.map(promote, parts):
            pass
    files = [{"name": output.name, "rows": output.rows, "bytes": output.bytes} for output in parts]
    manifest = {**about, "job": str(job_id), "rows": sum(output.rows for output in parts), "files": files}
    # Written in the staging folder, so that `vacate` removes what a crash in the middle of the write leaves.
    made = storage.join(staging_of(folder, job_id), MANIFEST)
    storage.write(made, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    storage.move(made, storage.join(folder, MANIFEST))
    check()
    vacate(folder, job_id)
    storage.write(storage.join(folder, SUCCESS), b"")


def _remove_strays(folder: str, listed: Collection[str]) -> None:
    """Delete parts that readers see and no commit lists: the database has lost the commits that recorded them."""
    strays = [name for name in visible_names(folder) if PART.fullmatch(name) and name not in listed]
    if strays:
        storage.delete(storage.join(folder, SUCCESS))  # the data set that it vouches for changes
    for name in strays:
        log.warning("stray_part_removed", folder=folder, name=name)
        storage.delete(storage.join(folder, name))
