"""Registry of file formats. To add a format, write a module that reads it and register it here."""

from collections.abc import Iterator

from pipeline.core.chunks import Extent, ParquetExtent, TextExtent
from pipeline.core.options import Columns
from pipeline.sources import csv_, jsonl, parquet
from pipeline.sources.decode import open_blocks, open_range
from pipeline.sources.places import locate_in_csv, locate_in_parquet, locate_lines
from pipeline.sources.source_file import Format, SourceFile
from pipeline.sources.validation import Notices, Parsed


def _read_jsonl(
    file: SourceFile, blocks: Iterator[bytes] | None, columns: Columns, item_bytes: int, notices: Notices
) -> Iterator[Parsed]:
    return jsonl.read_jsonl(blocks or open_blocks(file), file.name, columns, item_bytes, notices)


def _read_csv(
    file: SourceFile, blocks: Iterator[bytes] | None, columns: Columns, item_bytes: int, notices: Notices
) -> Iterator[Parsed]:
    dialect = csv_.Dialect.of(file, columns)
    return csv_.read_csv(blocks or open_blocks(file), file.name, dialect, columns, item_bytes, notices)


def _read_parquet(
    file: SourceFile, _blocks: Iterator[bytes] | None, columns: Columns, _item_bytes: int, notices: Notices
) -> Iterator[Parsed]:
    return parquet.read_parquet(file, columns, notices)


def _read_lines(file: SourceFile, extent: Extent, _rows: int, columns: Columns, item_bytes: int) -> Iterator[Parsed]:
    return jsonl.read_part(_range(file, extent), file.name, columns, item_bytes, extent.line)


def _read_csv_lines(
    file: SourceFile, extent: Extent, _rows: int, columns: Columns, item_bytes: int
) -> Iterator[Parsed]:
    dialect = csv_.Dialect.of(file, columns)
    header = csv_.read_header(open_blocks(file), file.name, dialect, columns, item_bytes, Notices())
    yield from csv_.read_part(_range(file, extent), file.name, header, columns, item_bytes, extent.line)


def _read_rows(file: SourceFile, extent: Extent, rows: int, columns: Columns, _item_bytes: int) -> Iterator[Parsed]:
    assert isinstance(extent, ParquetExtent)
    return parquet.read_rows(file, columns, extent.row_group, extent.offset, rows, extent.line)


def _range(file: SourceFile, extent: Extent) -> Iterator[bytes]:
    assert isinstance(extent, TextExtent)
    return open_range(file, extent.offset, extent.length)


JSONL = Format(
    name="jsonl", endings=(".jsonl", ".ndjson"), read=_read_jsonl, locate=locate_lines, read_extent=_read_lines
)
CSV = Format(
    name="csv", endings=(".csv",), divided=True, read=_read_csv, locate=locate_in_csv, read_extent=_read_csv_lines
)
TSV = Format(
    name="tsv", endings=(".tsv",), divided=True, read=_read_csv, locate=locate_in_csv, read_extent=_read_csv_lines
)
PARQUET = Format(
    name="parquet",
    endings=(".parquet",),
    unit="row",
    packable=False,
    read=_read_parquet,
    locate=locate_in_parquet,
    read_extent=_read_rows,
)
FORMATS = (JSONL, CSV, TSV, PARQUET)
