"""A job's vectors as a file, streamed in index order."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection

from pipeline import parts
from pipeline.errors import UserError
from pipeline.parts import OUR_COLUMNS
from pipeline.store import embeddings, jobs, outputs

Block = Sequence[tuple[Any, ...]]


def export(connection: Connection, job_id: UUID, target: Path) -> int:
    """Write a job's vectors to `target` (.parquet or .jsonl): index, key, embedding, tokens, truncated and carried
    columns. The file appears when it is whole. Returns how many rows it has.

    Raises:
        UserError: another ending, or the folder can't be written.
    """
    writers: dict[str, Callable[[Iterator[Block], Path, int], None]] = {
        ".parquet": _write_parquet,
        ".jsonl": _write_jsonl,
    }
    writer = writers.get(target.suffix)
    if writer is None:
        raise UserError(f"--to {target}: give a file that ends in .parquet or .jsonl.")
    count = 0

    def counted(blocks: Iterable[Block]) -> Iterator[Block]:
        nonlocal count
        for block in blocks:
            yield block
            count += len(block)

    partial = target.with_name(f".{target.name}.partial")
    row = jobs.by_id(connection, job_id)
    assert row
    folder = row["options"].get("output")
    blocks = _read_parts(connection, job_id, folder) if folder else embeddings.stream(connection, job_id)
    try:
        writer(counted(blocks), partial, jobs.vector_space(connection, job_id)["dimensions"])
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"--to {target}: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_jsonl(blocks: Iterator[Block], path: Path, _dimensions: int) -> None:
    with path.open("wb") as file:
        for block in blocks:
            for index, key, vector, tokens, truncated, carried in block:
                row = {
                    "index": index,
                    "key": key,
                    "embedding": vector,
                    "tokens": tokens,
                    "truncated": truncated,
                    **_without_clash(carried),
                }
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def _without_clash(carried: dict[str, Any] | None) -> dict[str, Any]:
    """A carried column never hides one of ours."""
    return {name: value for name, value in (carried or {}).items() if name not in OUR_COLUMNS}


def _read_parts(connection: Connection, job_id: UUID, folder: str) -> Iterator[Block]:
    """A job's vectors from its Parquet output, chunk by chunk."""
    for chunk in outputs.by_chunk(connection, job_id):
        if not chunk.outputs:
            continue
        table = parts.read(folder, job_id, chunk.outputs).combine_chunks()
        vectors = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False)).astype(np.float32)
        carried = table.drop_columns(list(OUR_COLUMNS)).to_pylist()
        columns = (table[name].to_pylist() for name in ("index", "key", "tokens", "truncated"))
        indexes, keys, tokens, truncated = columns
        yield list(zip(indexes, keys, vectors, tokens, truncated, carried, strict=True))


def _write_parquet(blocks: Iterator[Block], path: Path, dimensions: int) -> None:
    first = next(blocks, None)
    carried = sorted({name for row in first or () for name in _without_clash(row[5])})
    schema = parts.schema(dimensions, half=False, carried=carried)
    with pq.ParquetWriter(path, schema, **parts.WRITING) as writer:
        while first:
            writer.write_batch(_batch(first, schema, carried))
            first = next(blocks, None)


def _batch(block: Block, schema: Any, carried: Sequence[str]) -> Any:
    indexes, keys, vectors, tokens, truncated, extra = zip(*block, strict=True)
    flat = pa.array(np.concatenate(vectors).astype(np.float32, copy=False))
    columns = [
        pa.array(indexes, pa.int64()),
        pa.array(keys, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        pa.array(tokens, pa.int32()),
        pa.array(truncated, pa.bool_()),
        *(pa.array([parts.as_text((row or {}).get(name)) for row in extra], pa.string()) for name in carried),
    ]
    return pa.record_batch(columns, schema=schema)
