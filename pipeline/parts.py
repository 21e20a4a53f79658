"""A job's Parquet output: part files, and the data set that they become when the job completes.

Workers write parts below `_staging/<job>/`, where readers of the folder don't look. A part counts once the fenced
commit has written down its name; others were written by claims that had been lost. When the job completes, its parts
are moved to the folder itself, then come the manifest and at last `_SUCCESS`. Every step may be repeated.
"""

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from pipeline import exact_json, storage
from pipeline.errors import SourceChanged, UserError
from pipeline.jobs import Claim
from pipeline.options import VectorType
from pipeline.store.embeddings import Rows
from pipeline.store.outputs import Output

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
_STAGING = "_staging"
_CLAIM = "_job.json"
#: Objects moved at once: each move is a round trip or two.
_MOVES = 16
#: Names of parts, also those of versions before claims had tokens.
_PART = re.compile(r"part-\d+-\d+(-[0-9a-f]{32})?(-\d+)?\.parquet")

log = structlog.get_logger()


def schema(dimensions: int, kept_as: VectorType, carried: Sequence[str]) -> Any:
    """Columns of a file with vectors. A carried column of JSON values has no one type: each is kept as text."""
    element = pa.field("item", pa.from_numpy_dtype(kept_as.value), nullable=False)
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("key", pa.string()),
            pa.field("embedding", pa.list_(element, dimensions), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *(pa.field(name, pa.string()) for name in carried),
        ]
    )


def name_of(claim: Claim, number: int) -> str:
    """The file name of commit `number` of a claim."""
    return f"part-{claim.chunk_id}-{claim.fence}-{claim.token.hex}{f'-{number}' if number else ''}.parquet"


def write(claim: Claim, number: int, rows: Rows) -> Output:
    """Write a part, whole or not at all. It counts when the commit has recorded what is returned.

    Raises:
        StorageRefused, StorageUnreachable: it can't be written.
    """
    carried, kept_as = claim.options.columns.carry, claim.options.dtype
    values = [exact_json.loads(row) if row else {} for row in rows.carried] if carried else []
    kind = schema(rows.vectors.shape[1], kept_as, carried)
    flat = pa.array(rows.vectors.astype(kept_as.value, copy=False).ravel())
    batch = pa.record_batch(
        [
            pa.array(rows.indexes),
            pa.array(rows.keys, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, type=kind.field("embedding").type),
            pa.array(rows.tokens),
            pa.array(rows.truncated),
            *(pa.array([as_text(value.get(name)) for value in values], pa.string()) for name in carried),
        ],
        schema=kind,
    )
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, kind, **WRITING) as writer:
        writer.write_batch(batch)
    output = Output(
        chunk_id=claim.chunk_id,
        fence=claim.fence,
        part=number,
        name=name_of(claim, number),
        rows=len(rows.indexes),
        bytes=buffer.tell(),
    )
    assert claim.options.output
    storage.write(storage.join(_staging(claim.options.output, claim.job_id), output.name), buffer.getbuffer())
    return output


#: Vectors hardly compress, and have no dictionary; the other columns do.
WRITING: Mapping[str, Any] = {"compression": "zstd", "use_dictionary": ["key"]}


def as_text(value: Any) -> str | None:
    """A carried JSON value as a string: strings as they are."""
    return value if value is None or isinstance(value, str) else exact_json.dumps(value).decode()


def _staging(folder: str, job_id: UUID) -> str:
    return storage.join(folder, f"{_STAGING}/{job_id}")


def occupy(folder: str, job_id: UUID) -> None:
    """Take an empty folder for a job's output; this proves that it can be written.

    Raises:
        UserError: something is there already.
        StorageRefused, StorageUnreachable: it can't be written.
    """
    ours = f"{_STAGING}/{job_id}/"
    for name in storage.names_below(folder):
        if not name.startswith(ours):
            raise UserError(f"{name} is there already; give an empty folder.", field="output", given=folder)
    storage.write(storage.join(_staging(folder, job_id), _CLAIM), orjson.dumps({"job": str(job_id)}))


def vacate(folder: str, job_id: UUID) -> None:
    """Delete what a job has left below `_staging`."""
    storage.delete_folder(_staging(folder, job_id))


def deliver(folder: str, job_id: UUID, outputs: Sequence[Output], about: Mapping[str, Any]) -> None:
    """Make a completed job's parts a data set, and the folder hold no other. May be repeated, also after it was cut off
    anywhere.

    Raises:
        StorageRefused, StorageUnreachable: it isn't finished.
    """

    _remove_strays(folder, {output.name for output in outputs})

    def promote(output: Output) -> None:
        storage.move(storage.join(_staging(folder, job_id), output.name), storage.join(folder, output.name))

    with ThreadPoolExecutor(_MOVES) as pool:
        for _ in pool.map(promote, outputs):
            pass
    files = [{"name": output.name, "rows": output.rows, "bytes": output.bytes} for output in outputs]
    manifest = {**about, "job": str(job_id), "rows": sum(output.rows for output in outputs), "files": files}
    # Made where `vacate` clears away what a death in the middle of it leaves.
    made = storage.join(_staging(folder, job_id), MANIFEST)
    storage.write(made, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    storage.move(made, storage.join(folder, MANIFEST))
    vacate(folder, job_id)
    storage.write(storage.join(folder, SUCCESS), b"")


def _remove_strays(folder: str, listed: Collection[str]) -> None:
    """Delete parts that readers see and nobody lists: a database that has lost its last commits forgot them."""
    strays = [name for name in visible_names(folder) if _PART.fullmatch(name) and name not in listed]
    if strays:
        storage.delete(storage.join(folder, SUCCESS))  # what it vouches for goes
    for name in strays:
        log.warning("stray_part_removed", folder=folder, name=name)
        storage.delete(storage.join(folder, name))


def open_part(folder: str, job_id: UUID, output: Output) -> pq.ParquetFile:
    """Open a recorded part, wherever it is by now.

    Raises:
        SourceChanged: it is gone.
    """
    for place in (_staging(folder, job_id), folder):
        found = storage.stat(storage.join(place, output.name))
        if found:
            return pq.ParquetFile(storage.open_file(found.uri, found.etag))
    raise SourceChanged(f"{storage.join(folder, output.name)}: this part of job {job_id} is gone.")


def names_of_parts(folder: str, job_id: UUID) -> set[str]:
    """The parts that lie in a job's folder, delivered or not."""
    # In the direction in which they are moved: what leaves one place between the two looks is met in the other.
    return {*visible_names(_staging(folder, job_id)), *visible_names(folder)}


def indexes(folder: str, job_id: UUID, outputs: Sequence[Output]) -> npt.NDArray[np.int64]:
    """The indexes in recorded parts, in the order of the files.

    Raises:
        SourceChanged: a part is gone.
    """
    found = [np.zeros(0, np.int64)]
    for output in outputs:
        with open_part(folder, job_id, output) as part:
            found.append(part.read(columns=["index"])["index"].to_numpy())
    return np.concatenate(found)


def visible_names(folder: str) -> Iterator[str]:
    """The Parquet files that a reader of the folder sees."""
    return (name for name in storage.names_below(folder) if name.endswith(".parquet") and name[0] not in "_.")


def read(folder: str, job_id: UUID, outputs: Sequence[Output]) -> pa.Table:
    """The rows of recorded parts in index order.

    Raises:
        SourceChanged: a part is gone.
    """
    tables = []
    for output in outputs:
        with open_part(folder, job_id, output) as part:
            tables.append(part.read())
    return pa.concat_tables(tables).sort_by("index")
