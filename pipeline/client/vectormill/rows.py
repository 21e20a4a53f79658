"""Rows for an upload: files as they are, data frames and Arrow as Parquet, other rows as JSON lines."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias
from zlib import compressobj

from .errors import UserError

#: Rows of a job or a sync: a data frame (Polars, pandas, Arrow, DuckDB and others), a path or URI or a list of paths, a
#: cursor on which a query was executed, or rows as mappings, or texts alone.
Data: TypeAlias = Any

_FETCHED = 10_000
_GZIP = 31  # of zlib's window bits: with gzip's header


def source_of(data: Data) -> str | None:
    """Return the URI that the api reads itself; `None`: the data are to be uploaded."""
    return data if isinstance(data, str) and "://" in data else None


def files_of(data: Data, folder: Path) -> list[Path]:
    """Return the files to upload; rows are written to one in `folder`.

    Raises:
        UserError: a file isn't there, or a value of a row can't be sent.
    """
    if isinstance(data, (str, os.PathLike)):
        return [_existing(Path(data))]
    if isinstance(data, (list, tuple)) and data and all(isinstance(given, os.PathLike) for given in data):
        return [_existing(Path(given)) for given in data]
    if (frame := _as_frame(data)) is not None:
        return [_write_parquet(frame, folder / "rows.parquet")]
    return [_written(_mappings(data), folder / "rows.jsonl.gz")]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: {'a folder; give its files' if path.is_dir() else 'no such file'}.")
    return path


def _as_frame(data: Data) -> Any:
    """Return what has Arrow's columns: a data frame of narwhals, or data with an Arrow stream. `None`: neither."""
    import narwhals as nw

    frame = nw.from_native(data, pass_through=True)
    if isinstance(frame, nw.LazyFrame | nw.DataFrame):
        return frame
    return data if hasattr(data, "__arrow_c_stream__") else None


def _write_parquet(frame: Any, path: Path) -> Path:
    import narwhals as nw
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if isinstance(frame, nw.LazyFrame):
            frame = frame.collect()
        table = frame.to_arrow() if isinstance(frame, nw.DataFrame) else pa.table(frame)
        pq.write_table(table, path)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"the frame can't be written as Parquet: {error}") from error
    return path


def _mappings(data: Data) -> Iterator[Mapping[str, Any]]:
    if hasattr(data, "description") and hasattr(data, "fetchmany"):
        yield from _of_cursor(data)
        return
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UserError(f"{type(data).__name__}: give a data frame, paths, a cursor, or rows as mappings.")
    for at, row in enumerate(data):
        if isinstance(row, str):
            yield {"text": row}
        elif isinstance(row, Mapping):
            yield row
        else:
            raise UserError(f"row {at:,}: {type(row).__name__}; give a mapping of columns, or a text.")


def _of_cursor(cursor: Any) -> Iterator[Mapping[str, Any]]:
    if cursor.description is None:
        raise UserError("the cursor has no rows; execute a query on it first.")
    names = [column[0] for column in cursor.description]
    while rows := cursor.fetchmany(_FETCHED):
        for row in rows:
            yield row if isinstance(row, Mapping) else dict(zip(names, row, strict=True))


def _written(rows: Iterator[Mapping[str, Any]], path: Path) -> Path:
    import orjson

    packed = compressobj(level=1, wbits=_GZIP)
    with path.open("wb") as file:
        for at, row in enumerate(rows):
            try:
                line = orjson.dumps(row, default=_scalar, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
            except TypeError as error:
                raise UserError(f"row {at:,}: {error.__cause__ or error}; write it as a string.") from None
            file.write(packed.compress(line))
        file.write(packed.flush())
    return path


def _scalar(value: Any) -> str:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} can't be sent")


def listed(given: Sequence[str] | str) -> list[str]:
    """Return names as a list; a single one may stand alone."""
    return [given] if isinstance(given, str) else list(given)
