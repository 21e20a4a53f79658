"""A job's vectors as a file, streamed in index order."""

import json
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

from pipeline.errors import UserError
from pipeline.store import embeddings

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
    try:
        dimensions = embeddings.dimensions(connection, job_id)
        writer(counted(embeddings.stream(connection, job_id)), partial, dimensions)
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


OUR_COLUMNS = ("index", "key", "embedding", "tokens", "truncated")


def _write_parquet(blocks: Iterator[Block], path: Path, dimensions: int) -> None:
    first = next(blocks, None)
    carried = sorted({name for row in first or () for name in _without_clash(row[5])})
    schema = pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("key", pa.string()),
            pa.field("embedding", pa.list_(pa.field("item", pa.float32(), nullable=False), dimensions), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            # A column of JSON values has no one type: each value is kept as text, strings as they are.
            *(pa.field(name, pa.string()) for name in carried),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        while first:
            writer.write_batch(_batch(first, schema, carried))
            first = next(blocks, None)


def _batch(block: Block, schema: Any, carried: Sequence[str]) -> Any:
    indexes, keys, vectors, tokens, truncated, extra = zip(*block, strict=True)
    flat = pa.array(np.concatenate(vectors))
    columns = [
        pa.array(indexes, pa.int64()),
        pa.array(keys, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        pa.array(tokens, pa.int32()),
        pa.array(truncated, pa.bool_()),
        *(pa.array([_as_text((row or {}).get(name)) for row in extra], pa.string()) for name in carried),
    ]
    return pa.record_batch(columns, schema=schema)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
