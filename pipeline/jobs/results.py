"""Export of a job's vectors in index order, as a file or as a stream of bytes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from pipeline.chunk_io.parquet_sink import WRITING, as_text
from pipeline.chunk_io.parquet_sink import schema as parquet_schema
from pipeline.chunk_io.sinks import Block, Connect, sink_of
from pipeline.core import exact_json
from pipeline.core.errors import UserError
from pipeline.core.options import OUR_COLUMNS, VectorType
from pipeline.db import jobs
from pipeline.db.database import snapshot
from pipeline.jobs.status import known_job

#: An index past the last one of any job.
LAST_INDEX = 2**63 - 1


def export(engine: Engine, job_id: UUID, target: Path) -> int:
    """Write a job's vectors to `target` (.parquet or .jsonl) and return the number of rows.

    The columns are index, key, embedding, tokens, truncated and carried ones. The file appears only when it is
    complete.

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
            blocks, dimensions, carried = _of_job(lambda: nullcontext(connection), job_id, 0, LAST_INDEX)
            for piece in encode(counted(blocks), kind, dimensions, carried):
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
    blocks, dimensions, carried = _of_job(engine.begin, job_id, first_index, end_index)
    return encode((block for block in blocks if block), kind, dimensions, carried)


def _of_job(connect: Connect, job_id: UUID, first_index: int, end_index: int) -> tuple[Iterator[Block], int, list[str]]:
    """Return a job's vectors, their dimensions, and the names of their carried columns."""
    with connect() as connection:
        options = known_job(connection, job_id).options
        dimensions = jobs.vector_space(connection, job_id)["dimensions"]
    carried = [name for name in dict.fromkeys(options.columns.carry) if name not in OUR_COLUMNS]
    return sink_of(options).read(connect, job_id, first_index, end_index), dimensions, carried


def encode(blocks: Iterator[Block], kind: str, dimensions: int, carried: Sequence[str]) -> Iterator[bytes]:
    """Encode rows as one file of a kind, `parquet` or `jsonl`, and yield its bytes piece by piece.

    A Parquet file has all columns of `carried`, even if no row has them.
    """
    return _ENCODERS[kind](blocks, dimensions, carried)


def _json_lines(blocks: Iterator[Block], _dimensions: int, _carried: Sequence[str]) -> Iterator[bytes]:
    for block in blocks:
        yield b"".join(_json_line(*row) for row in block)


def _json_line(index: int, key: str | None, vector: Any, tokens: int, truncated: bool, carried: Any) -> bytes:
    row = {"index": index, "key": key, "embedding": vector, "tokens": tokens, "truncated": truncated}
    return exact_json.dumps(row | _without_clash(carried), orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _without_clash(carried: dict[str, Any] | None) -> dict[str, Any]:
    """Return the carried columns without those that would hide one of ours."""
    return {name: value for name, value in (carried or {}).items() if name not in OUR_COLUMNS}


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


def _parquet(blocks: Iterator[Block], dimensions: int, carried: Sequence[str]) -> Iterator[bytes]:
    schema = parquet_schema(dimensions, VectorType.FLOAT32, carried)
    buffer = _Buffer()
    with pq.ParquetWriter(buffer, schema, **WRITING) as writer:
        for block in blocks:
            writer.write_batch(_batch(block, schema, carried))
            yield buffer.take()
    yield buffer.take()


_ENCODERS: dict[str, Callable[[Iterator[Block], int, Sequence[str]], Iterator[bytes]]] = {
    "parquet": _parquet,
    "jsonl": _json_lines,
}


def _batch(block: Block, schema: Any, carried: Sequence[str]) -> Any:
    indexes, keys, vectors, tokens, truncated, extra = zip(*block, strict=True)
    flat = pa.array(np.concatenate(vectors).astype(np.float32, copy=False))
    columns = [
        pa.array(indexes, pa.int64()),
        pa.array(keys, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        pa.array(tokens, pa.int32()),
        pa.array(truncated, pa.bool_()),
        *(pa.array([as_text((row or {}).get(name)) for row in extra], pa.string()) for name in carried),
    ]
    return pa.record_batch(columns, schema=schema)
