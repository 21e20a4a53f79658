"""Part files of a job's Parquet output, in its staging folder and in the folder that readers see."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import exact_json
from pipeline.core.chunks import Claim
from pipeline.core.errors import SourceChanged
from pipeline.core.options import PASSAGE_COLUMNS, VectorType
from pipeline.core.vectors import stored
from pipeline.db.embeddings import EmbeddedRows
from pipeline.db.outputs import Output
from pipeline.infra import storage

#: Pattern of parts' names, also of versions in which claims had no token, with the commit that a part is of.
PART = re.compile(r"(part-\d+-\d+)(?:-[0-9a-f]{32})?(?:-(\d+))?\.parquet")
#: Folder of parts until the job completes, below the output.
STAGING = "_staging"


def schema(dimensions: int, kept_as: VectorType, carried: Sequence[str], *, passages: bool) -> Any:
    """Return the schema of a file of vectors. Carried JSON values are kept as text, as a column may mix types."""
    element = pa.field("item", pa.from_numpy_dtype(kept_as.value), nullable=False)
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("key", pa.string()),
            pa.field("embedding", pa.list_(element, dimensions), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in (PASSAGE_COLUMNS if passages else ())),
            *(pa.field(name, pa.string()) for name in carried),
        ]
    )


def name_of(claim: Claim, number: int) -> str:
    """Return the file name of commit `number` of a claim."""
    return part_name(claim.chunk_id, claim.fence, claim.token, number)


def part_name(chunk_id: int, fence: int, token: UUID, number: int) -> str:
    return f"part-{chunk_id}-{fence}-{token.hex}{f'-{number}' if number else ''}.parquet"


def write(folder: str, claim: Claim, number: int, rows: EmbeddedRows) -> Output:
    """Write a part atomically, and return its description. The part counts once a commit has recorded that.

    Raises:
        StorageRefused, StorageUnreachable: it can't be written.
    """
    carried, kept_as = claim.options.columns.carry, claim.options.dtype
    values = [exact_json.loads(row) if row else {} for row in rows.carried] if carried else []
    kind = schema(rows.vectors.shape[1], kept_as, carried, passages=rows.passages is not None)
    flat = pa.array(stored(rows.vectors, kept_as).ravel())
    batch = pa.record_batch(
        [
            pa.array(rows.indexes),
            pa.array(rows.keys, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, type=kind.field("embedding").type),
            pa.array(rows.tokens),
            pa.array(rows.truncated),
            *map(pa.array, rows.passages or ()),
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
    storage.write(storage.join(staging_of(folder, claim.job_id), output.name), buffer.getbuffer())
    return output


#: Options of Parquet's writer. Vectors hardly compress and need no dictionary; only the keys get one.
WRITING: Mapping[str, Any] = {"compression": "zstd", "use_dictionary": ["key"]}


def as_text(value: Any) -> str | None:
    """Return a carried value as text: strings and None as they are, other values as JSON."""
    return value if value is None or isinstance(value, str) else exact_json.dumps(value).decode()


@dataclass(frozen=True, slots=True)
class Left:
    """Parquet file without some keys."""

    rows: int
    data: memoryview
    #: The rows that it hasn't, without vectors.
    gone: Any


def without_keys(file: Any, keys: Set[str]) -> Left | None:
    """Return a Parquet file of vectors without the rows of some keys; `None`: it has none of them."""
    named = pc.is_in(file.read(columns=["key"])["key"], value_set=pa.array(sorted(keys), pa.string()))
    if not pc.any(named).as_py():
        return None
    table = file.read()
    left, gone = table.filter(pc.invert(named)), table.drop_columns(["embedding"]).filter(named)
    buffer = io.BytesIO()
    pq.write_table(left, buffer, **WRITING)
    return Left(len(left), buffer.getbuffer(), gone)


def staging_of(folder: str, job_id: UUID) -> str:
    return storage.join(folder, f"{STAGING}/{job_id}")


def open_part(folder: str, job_id: UUID, output: Output) -> pq.ParquetFile:
    """Open a recorded part, in the staging folder or in the job's folder.

    Raises:
        SourceChanged: it is gone.
    """
    for place in (staging_of(folder, job_id), folder):
        found = storage.stat(storage.join(place, output.name))
        if found:
            return pq.ParquetFile(storage.open_file(found.uri, found.etag))
    raise SourceChanged(f"{storage.join(folder, output.name)}: this part of job {job_id} is gone.")


def names_of_parts(folder: str, job_id: UUID) -> set[str]:
    """Return the names of the parts in a job's staging folder and in its folder."""
    # Listed in the direction in which parts move: one that is moved between the two listings is found in the second.
    return {*visible_names(staging_of(folder, job_id)), *visible_names(folder)}


def indexes(folder: str, job_id: UUID, parts: Sequence[Output]) -> npt.NDArray[np.int64]:
    """Return the indexes in recorded parts, in the order of the files.

    Raises:
        SourceChanged: a part is gone.
    """
    found = [np.zeros(0, np.int64)]
    for output in parts:
        with open_part(folder, job_id, output) as part:
            found.append(part.read(columns=["index"])["index"].to_numpy())
    return np.concatenate(found)


def visible_names(folder: str) -> Iterator[str]:
    """Yield the names of the Parquet files that a reader of the folder sees."""
    return (name for name in storage.names_below(folder) if name.endswith(".parquet") and name[0] not in "_.")


def read(folder: str, job_id: UUID, parts: Sequence[Output]) -> pa.Table:
    """Return the rows of recorded parts in index order.

    Raises:
        SourceChanged: a part is gone.
    """
    tables = []
    for output in parts:
        with open_part(folder, job_id, output) as part:
            tables.append(part.read())
    table = pa.concat_tables(tables)
    keys = [name for name in ("index", "passage") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in keys])
