"""Parquet, row group by row group."""

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.decode import READ_BYTES, is_bomb
from pipeline.sources.parquet_guard import GROWS, Stored, check_pages
from pipeline.sources.parquet_values import schema_of, values_of
from pipeline.sources.source_file import SourceFile, reason
from pipeline.sources.validation import (
    BLOCK_BYTES,
    Notices,
    Parsed,
    compose,
    missing_column,
    shown,
    without_key,
)
from pipeline.sources.values import carried

#: Upper bound of rows per read: neighbouring texts may be far longer than the average.
_BATCH_ROWS = 1_000
#: Upper bound of a batch once its dictionaries are unfolded.
_BATCH_BYTES = 64 * 1024 * 1024
#: Assumed length of a string of which delta encoding stores only the endings of the next ones.
_PREFIX_BYTES = 1024 * 1024
_PREFIXED = {"DELTA_BYTE_ARRAY"}
_FOLDED = {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}
_BAD_FOOTER = "the Parquet footer can't be read; the file is truncated or damaged."


def read_parquet(file: SourceFile, columns: Columns, notices: Notices) -> Iterator[Parsed]:
    """Yield the rows of a Parquet file. Values that JSON lacks, such as dates and decimals, become strings.

    Raises:
        SourceError: it's no Parquet file or a damaged one, or a column is missing or of a type that can't
            serve.
    """
    with _Table(file, columns, notices) as table:
        yield from table.rows(0, 0, table.metadata.num_rows, 1)


def read_rows(
    file: SourceFile, columns: Columns, group: int, skip: int, count: int, first_row: int
) -> Iterator[Parsed]:
    """Yield `count` rows of row group `group` and the following ones, after the first `skip` rows of that group.

    `first_row` is the number of the first row yielded, counted from 1 in the file. Raises as `read_parquet`.
    """
    with _Table(file, columns, Notices()) as table:
        yield from table.rows(group, skip, count, first_row)


def row_groups(file: SourceFile, columns: Columns, notices: Notices) -> Iterator[tuple[int, int, int]]:
    """Yield each row group from the metadata: (number, rows, average bytes a row). Raises as `read_parquet`."""
    with _Table(file, columns, notices) as table:
        for group in range(table.metadata.num_row_groups):
            yield group, table.metadata.row_group(group).num_rows, table.average_bytes(group)


class _DataReachedError(Exception):
    """Arrow has parsed the metadata and asks for data."""


class _MetadataOnly(io.RawIOBase):
    """File of the right size whose bytes can't be read, to let Arrow parse metadata alone."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, _size: int = -1, /) -> bytes:
        raise _DataReachedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Table:
    """Open Parquet file, with the columns to read."""

    def __init__(self, file: SourceFile, columns: Columns, notices: Notices) -> None:
        self._file = file
        self._name = file.name
        self._columns = columns
        self._raw = file.open()
        try:
            self.metadata = _metadata(self._raw, file.name)
            self._unread = _piece_by_piece(_MetadataOnly(file.bytes or 0), self.metadata, [])
            schema = schema_of(self.metadata)
            self._wanted = _checked(schema, file.name, columns)
            paths = [self.metadata.schema.column(at).path for at in range(self.metadata.num_columns)]
        except UnicodeDecodeError:
            self._raw.close()
            raise SourceError(f"{file.name}: a column's name is not valid UTF-8; make the file again.") from None
        except BaseException:
            self._raw.close()
            raise
        if columns.key not in schema.names:
            notices.add("no key", without_key(file.name, columns.key, schema.names))
        self._types = {name: schema.field(name).type for name in self._wanted}
        self._texts = [name for name in self._wanted if _is_text(schema.field(name).type)]
        # A nested column is stored as several.
        self._stored = [
            at
            for at, path in enumerate(paths)
            if any(path == column or path.startswith(f"{column}.") for column in self._wanted)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def rows(self, group: int, skip: int, count: int, first: int) -> Iterator[Parsed]:
        """Yield `count` rows from row group `group` on, after `skip` of its rows; `first` is the first one's number."""
        try:
            parquet, folded = (_piece_by_piece(self._raw, self.metadata, columns) for columns in ([], self._texts))
            while count and group < self.metadata.num_row_groups:
                left = min(count, self.metadata.row_group(group).num_rows - skip)
                count -= left
                for part in self._group(parquet, folded, group, skip, left):
                    yield self._parsed(part, first)
                    first += len(part)
                    left -= len(part)
                if left:
                    missing = f"{left:,} rows that the footer names aren't there"
                    raise SourceError(f"{self._name} row {first:,}: {missing}; make the file again.")
                group, skip = group + 1, 0
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            fault = reason(error) if isinstance(error, OSError) and error.errno else "the data is damaged"
            raise SourceError(f"{self._name} row {first:,}: {fault}; make the file again.") from None

    def _group(
        self, parquet: pq.ParquetFile, folded: pq.ParquetFile, group: int, skip: int, count: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield up to `count` rows of a group past the first `skip`, in small batches."""
        self._check_pages(group, skip + count)
        longest = self._longest_bytes(folded, group)
        rows = min(_BATCH_ROWS, BLOCK_BYTES // self.average_bytes(group), _BATCH_BYTES // longest)
        for batch in parquet.iter_batches(max(1, rows), [group], self._wanted, use_threads=False):
            if skip >= len(batch):
                skip -= len(batch)
                continue
            wanted = batch.slice(skip, count)
            skip, count = 0, count - len(wanted)
            yield from _cut(wanted)
            if not count:
                return

    def _parsed(self, part: pa.RecordBatch, first: int) -> Parsed:
        columns = self._columns
        more = None
        if columns.carry:
            values = zip(*(map(carried, self._values(part, column)) for column in columns.carry), strict=True)
            more = [dict(zip(columns.carry, row, strict=True)) for row in values]
        texts, titles = self._texts_of(part)
        keyed = columns.key in self._types
        return Parsed(
            range(first, first + len(part)),
            texts,
            self._values(part, columns.key) if keyed else [None] * len(part),
            more,
            titles,
        )

    def _texts_of(self, part: pa.RecordBatch) -> tuple[list[object], list[object] | None]:
        columns = self._columns
        if not columns.composed:
            return self._values(part, columns.text), None
        names = [column for _, column in columns.texts]
        values = zip(*(self._values(part, column) for column in names), strict=True)
        return compose(columns, [dict(zip(names, row, strict=True)) for row in values])

    def _values(self, part: pa.RecordBatch, column: str) -> list[object]:
        return values_of(part.column(column), self._types[column])

    def _longest_bytes(self, folded: pq.ParquetFile, group: int) -> int:
        """Return the longest string that the group's texts may hold more often than their sizes show; at least 1.

        A small file may name one long text a million times in a dictionary, or write but what differs from the one
        before.
        """
        found = self.metadata.row_group(group)
        # By the schema's names: a row group of a damaged file has others.
        encodings = {self.metadata.schema.column(at).path: set(found.column(at).encodings) for at in self._stored}
        longest = _PREFIX_BYTES if any(encodings[name] & _PREFIXED for name in self._texts) else 1
        texts = [name for name in self._texts if encodings[name] & _FOLDED]
        for batch in folded.iter_batches(1, [group], texts, use_threads=False) if texts else ():
            for column in batch.columns:
                longest = max(longest, pc.max(pc.binary_length(column.dictionary)).as_py() or 0)
            break
        return longest

    def average_bytes(self, group: int) -> int:
        """Return the average bytes of a decompressed row of a group, dictionaries still folded; at least 1."""
        self._check_chunks(group)
        found = self.metadata.row_group(group)
        stored = [found.column(at) for at in self._stored]
        unpacked: int = sum(column.total_uncompressed_size for column in stored)
        if is_bomb(sum(column.total_compressed_size for column in stored), unpacked):
            raise SourceError(f"{self._name}: {GROWS}")
        return max(1, unpacked // max(1, found.num_rows))

    def _check_pages(self, group: int, end: int) -> None:
        """Check the pages of a group's rows before `end`.

        Raises:
            SourceError: a page's header would have Arrow allocate more than the file can hold.
        """
        self._check_chunks(group)
        # Arrow reads whole batches, and may look at the page that follows.
        read = end + _BATCH_ROWS + 1
        check_pages(self._file, tuple(self._stored_in(group, at, read) for at in self._stored))

    def _stored_in(self, group: int, at: int, read: int) -> Stored:
        found = self.metadata.row_group(group)
        column = found.column(at)
        # As Arrow finds it: some writers name a dictionary at 0 where there is none.
        starts = (column.data_page_offset, column.dictionary_page_offset or 0)
        repeated = self.metadata.schema.column(at).max_repetition_level > 0
        return Stored(
            start=min((start for start in starts if start > 0), default=0),
            bytes=column.total_compressed_size,
            # A row of lists has any number of values.
            values=column.num_values if repeated else min(column.num_values, read),
            rows=found.num_rows,
            repeated=repeated,
        )

    def _check_chunks(self, group: int) -> None:
        """Raise `SourceError` where metadata of the columns is damaged: asked for it, Arrow would end the process, and
        only where it is about to read does it raise."""
        try:
            for _ in self._unread.iter_batches(1, [group], self._wanted, use_threads=False):
                break
        except _DataReachedError:
            return
        except (pa.ArrowException, OSError):
            raise SourceError(f"{self._name}: {_BAD_FOOTER}") from None


def _piece_by_piece(raw: BinaryIO | _MetadataOnly, metadata: pq.FileMetaData, folded: list[str]) -> pq.ParquetFile:
    """Open a file for reading in bounded memory; the columns `folded` stay dictionaries."""
    return pq.ParquetFile(
        raw,
        metadata=metadata,
        read_dictionary=folded,
        pre_buffer=False,
        buffer_size=READ_BYTES,
        page_checksum_verification=True,
    )


def _metadata(raw: BinaryIO, name: str) -> pq.FileMetaData:
    with suppress(pa.ArrowException, OSError):
        found = pq.read_metadata(raw)
        rows = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
        if min(rows, default=0) >= 0 and sum(rows) == found.num_rows:
            return found
    raw.seek(0)
    if raw.read(4) == b"PAR1":
        raise SourceError(f"{name}: {_BAD_FOOTER}")
    raise SourceError(f"{name}: not a Parquet file.")


def _checked(schema: pa.Schema, name: str, columns: Columns) -> list[str]:
    """Return the columns to read; raise `SourceError` if one is missing, duplicated or of an unusable type."""
    for field, column in columns.required:
        if column not in schema.names:
            texts = [field.name for field in schema if _is_text(field.type) and field.name != columns.key]
            raise missing_column(name, field, column, schema.names, texts)
    key = (columns.key,) if columns.key in schema.names else ()
    wanted = [column for column in columns.names if column in schema.names]
    for column in wanted:
        if schema.names.count(column) > 1:
            raise SourceError(f'{name}: the column "{shown(column)}" stands twice in the schema; rename one.')
    _check_types(schema, name, columns, key)
    return wanted


def _check_types(schema: pa.Schema, name: str, columns: Columns, key: tuple[str, ...]) -> None:
    for field, column in columns.texts:
        kind = schema.field(column).type
        if not _is_text(kind) and field == "text_column":
            raise SourceError(
                f'{name}: column "{shown(column)}" is {shown(str(kind))}, not a string; name a string column.',
                field=field,
            )
        if not (_is_plain(kind) or _is_written_out(kind)):
            raise SourceError(
                f'{name}: column "{shown(column)}" is {shown(str(kind))}; a template takes strings, numbers and '
                "booleans. Name another.",
                field=field,
            )
    for column in key:
        kind = schema.field(column).type
        if not (_is_plain(kind) or _is_written_out(kind)):
            raise SourceError(
                f'{name}: column "{shown(column)}" is {shown(str(kind))}; a key is a string, a number or a '
                "boolean. Name another.",
                field="key_column",
            )
    for column in columns.carry:
        kind = schema.field(column).type
        if not _can_be_carried(kind):
            raise SourceError(
                f'{name}: column "{shown(column)}" is {shown(str(kind))}, which can\'t be carried; leave it out.',
                field="carry",
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_plain(kind: pa.DataType) -> bool:
    """Return True if a type's values are strings, numbers, booleans or null."""
    tests = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_written_out(kind: pa.DataType) -> bool:
    """Return True if a type's values are written as strings, since JSON has no such type."""
    return pa.types.is_decimal(kind) or pa.types.is_temporal(kind) or kind == pa.uuid()


def _can_be_carried(kind: pa.DataType) -> bool:
    return _is_written_out(kind) or _is_json(kind)


def _is_json(kind: pa.DataType) -> bool:
    """Return True for a plain type, and for lists and structs of plain types."""
    if pa.types.is_nested(kind):
        return all(_is_json(kind.field(at).type) for at in range(kind.num_fields))
    return _is_plain(kind)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield slices whose strings take about 8 MiB, of types that Arrow's kernels accept."""
    sizes = np.zeros(len(batch), np.int64)
    columns = [_unfolded(column) for column in batch.columns]
    for column in columns:
        if pa.types.is_large_string(column.type):
            sizes += pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    parts = pa.RecordBatch.from_arrays(columns, batch.schema.names)
    blocks = np.cumsum(sizes) // BLOCK_BYTES
    ends = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
    for start, end in pairwise([0, *ends, len(batch)]):
        yield parts.slice(start, end - start)


def _unfolded(column: pa.Array) -> pa.Array:
    """Return strings of any type as large strings, whose offsets don't overflow; other columns unchanged."""
    if not _is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary.take(column.indices)
    return column.cast(pa.large_string())
