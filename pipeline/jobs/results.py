"""Export of a job's vectors in index order, as a file or as a stream of bytes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from pipeline.chunk_io.parquet_parts import WRITING, as_text
from pipeline.chunk_io.parquet_parts import schema as parquet_schema
from pipeline.chunk_io.sinks import Block, Connect, sink_of
from pipeline.core import exact_json
from pipeline.core.errors import UserError
from pipeline.core.options import OUR_COLUMNS, VectorType
from pipeline.db import jobs
from pipeline.db.database import snapshot
from pipeline.db.embeddings import Vector
from pipeline.jobs.status import known_job

#: An index past the last one of any job.
LAST_INDEX = 2**63 - 1


def export(engine: Engine, job_id: UUID, target: Path) -> int:
    """Write a job's vectors to `target` (.parquet or .jsonl) and return the number of rows.

    The columns are index, key, embedding, tokens, truncated, of passages also passage, start and stop, and carried
    ones. The file appears only when it is complete.

    Raises:
        UserError: `target` has another suffix, or its folder can't be written.
        UnknownJob: there is no such job.
    """
    kind = target.suffix.removeprefix(".")
    if kind not in _ENCODERS:
        raise UserError("give a file that ends in .parquet or .jsonl.", field="to", given=str(target))
    count = 0

    def counted(blocks: Iterable[Block]) -> Iterator[Block]:
        nonlocal count
        for block in blocks:
            yield block
            count += len(block)

    partial = target.with_name(f".{target.name}.partial")
    try:
        # One snapshot for all reads, so that a concurrent purge leaves no gap in the file.
        with partial.open("wb") as file, snapshot(engine) as connection:
            blocks, layout = _of_job(lambda: nullcontext(connection), job_id, 0, LAST_INDEX)
            for piece in encode(counted(blocks), kind, layout):
                file.write(piece)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{error.strerror or error}.", field="to", given=str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def stream(engine: Engine, job_id: UUID, kind: str, first_index: int, end_index: int) -> Iterator[bytes]:
    """Yield a job's vectors from `first_index` to before `end_index`, encoded as by `encode`.

    No transaction lasts longer than reading one page takes, however slow the consumer is.
    """
    blocks, layout = _of_job(engine.begin, job_id, first_index, end_index)
    return encode((block for block in blocks if block), kind, layout)


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of a file of vectors."""

    dimensions: int
    #: Names of the carried columns. A Parquet file has all of them, even if no row has them.
    carried: Sequence[str] = ()
    #: True if rows are of passages.
    passages: bool = False


def _of_job(connect: Connect, job_id: UUID, first_index: int, end_index: int) -> tuple[Iterator[Block], Layout]:
    """Return a job's vectors, and the columns of a file of them."""
    with connect() as connection:
        options = known_job(connection, job_id).options
        dimensions = jobs.vector_space(connection, job_id)["dimensions"]
    # Older versions let columns be carried that hide ours.
    carried = [name for name in dict.fromkeys(options.columns.carry) if name not in OUR_COLUMNS]
    blocks = sink_of(options).read(connect, job_id, first_index, end_index)
    return blocks, Layout(dimensions, carried, options.splits)


def encode(blocks: Iterator[Block], kind: str, layout: Layout) -> Iterator[bytes]:
    """Encode rows as one file of a kind, `parquet` or `jsonl`, and yield its bytes piece by piece."""
    return _ENCODERS[kind](blocks, layout)


def _json_lines(blocks: Iterator[Block], layout: Layout) -> Iterator[bytes]:
    for block in blocks:
        yield b"".join(_json_line(row, passages=layout.passages) for row in block)


def _json_line(row: Vector, *, passages: bool) -> bytes:
    values: dict[str, Any] = {
        "index": row.index,
        "key": row.key,
        "embedding": row.vector,
        "tokens": row.tokens,
        "truncated": row.truncated,
    }
    if passages:
        values |= {"passage": row.passage, "start": row.start, "stop": row.stop}
    # Not `|`: a carried column never hides one of ours.
    for name, value in (row.carried or {}).items():
        values.setdefault(name, value)
    return exact_json.dumps(values, orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


class _Buffer:
    """Output file of Parquet's writer, which keeps the bytes until `take` removes them."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, piece: Any) -> int:
        data = bytes(piece)
        self._pieces.append(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> bytes:
        taken, self._pieces = b"".join(self._pieces), []
        return taken


def _parquet(blocks: Iterator[Block], layout: Layout) -> Iterator[bytes]:
    schema = parquet_schema(layout.dimensions, VectorType.FLOAT32, layout.carried, passages=layout.passages)
    buffer = _Buffer()
    with pq.ParquetWriter(buffer, schema, **WRITING) as writer:
        for block in blocks:
            writer.write_batch(_batch(block, schema, layout))
            yield buffer.take()
    yield buffer.take()


_ENCODERS: dict[str, Callable[[Iterator[Block], Layout], Iterator[bytes]]] = {
    "parquet": _parquet,
    "jsonl": _json_lines,
}


def _batch(block: Block, schema: Any, layout: Layout) -> Any:
    indexes, keys, vectors, tokens, truncated, extra, *numbers = zip(*block, strict=True)
    flat = pa.array(np.concatenate(vectors).astype(np.float32, copy=False))
    columns = [
        pa.array(indexes, pa.int64()),
        pa.array(keys, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        pa.array(tokens, pa.int32()),
        pa.array(truncated, pa.bool_()),
        *(pa.array(column, pa.int32()) for column in numbers if layout.passages),
        *(pa.array([as_text((row or {}).get(name)) for row in extra], pa.string()) for name in layout.carried),
    ]
    return pa.record_batch(columns, schema=schema)
