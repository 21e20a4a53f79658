"""Values of Parquet columns as JSON and keys take them: types that Arrow reads as bytes, dates, intervals, decimals."""

from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.values import interval

#: Parquet's own interval: months, days and milliseconds.
_INTERVAL = np.dtype([("months", "<u4"), ("days", "<u4"), ("milliseconds", "<u4")])


def schema_of(metadata: pq.FileMetaData) -> pa.Schema:
    """Return the Arrow schema, with UUIDs and intervals typed: Arrow reads both as plain bytes."""
    schema = metadata.schema.to_arrow_schema()
    for stored in map(metadata.schema.column, range(metadata.num_columns)):
        kind = {"UUID": pa.uuid(), "INTERVAL": pa.month_day_nano_interval()}.get(stored.logical_type.type)
        if stored.converted_type == "INTERVAL":
            kind = pa.month_day_nano_interval()
        at = schema.get_field_index(stored.path)
        if kind is not None and at >= 0:
            schema = schema.set(at, schema.field(at).with_type(kind))
    return schema


def values_of(column: pa.Array, kind: pa.DataType) -> list[object]:
    """Return a column's Python values, `kind` being its type in the schema; invalid UTF-8 becomes surrogates."""
    if pa.types.is_large_string(column.type):
        data = column.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in data]
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if kind == pa.uuid():
        return [value and UUID(bytes=value) for value in column.to_pylist()]
    if pa.types.is_interval(kind):
        return [value and _interval(value) for value in column.to_pylist()]
    if pa.types.is_duration(kind):
        return [None if value is None else _duration(value, kind.unit) for value in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_temporal(kind):
        return _moments(column)
    values: list[Any] = column.to_pylist()
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        # As few digits as tell it from its neighbours: 0.1 is 0.10000000149011612 as a float64.
        return [None if value is None else float(str(np.dtype(kind.to_pandas_dtype()).type(value))) for value in values]
    return values


def _moments(column: pa.Array) -> list[object]:
    """Return dates, times and timestamps in ISO 8601, in UTC, as `datetime` has them; nanoseconds stay."""
    kind = column.type
    zone = "+00:00" if pa.types.is_timestamp(kind) and kind.tz else ""
    if pa.types.is_time(kind):
        column = column.cast(pa.int32() if pa.types.is_time32(kind) else pa.int64()).cast(pa.int64())
    if zone or pa.types.is_time(kind):
        column = column.cast(pa.timestamp(kind.unit))
    written = [str(each) for each in np.datetime_as_string(column.to_numpy(zero_copy_only=False))]
    if pa.types.is_time(kind):
        written = [each.rpartition("T")[2] for each in written]
    return [None if each in ("", "NaT") else _shortest(each) + zone for each in written]


def _shortest(moment: str) -> str:
    """Return a timestamp with no fraction of a second, or with six digits of it, or nine."""
    whole, _, fraction = moment.partition(".")
    digits = fraction.ljust(9, "0")
    if not int(digits):
        return whole
    return f"{whole}.{digits if int(digits[6:]) else digits[:6]}"


def _interval(stored: bytes) -> str:
    months, days, milliseconds = np.frombuffer(stored, _INTERVAL)[0].tolist()
    return interval(months=months, days=days, nanoseconds=milliseconds * 10**6)


def _duration(count: int, unit: str) -> str:
    return interval(nanoseconds=count * {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit])
