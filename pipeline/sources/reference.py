"""Files that workers read themselves: where each row begins, and the rows of one chunk.

Parquet has metadata, and nothing else is read to plan it. Text has none: it is streamed once, and of each row only
the place is kept for a moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import assert_never

import numpy as np
import numpy.typing as npt

from pipeline.errors import SourceError
from pipeline.jobs import Extent
from pipeline.options import Columns
from pipeline.sources import csv_
from pipeline.sources.csv_ import Dialect, csv_rows, read_header
from pipeline.sources.files import Compression, Format, SourceFile, source_file
from pipeline.sources.jsonl import check_columns, read_part
from pipeline.sources.open import BrokenStreamError, mark_bytes, open_blocks, open_range, unpacked_blocks
from pipeline.sources.parquet import read_rows, row_groups
from pipeline.sources.rows import Notices, Parsed, Rows, judge

#: Packed text can only be unpacked from its beginning, which each of its chunks does: a longer one is refused.
MOST_UNPACKED_BYTES = 4 * 1024**3
#: Rows whose places are told at once.
_PLACES = 65_536
_WHITE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where consecutive rows of a file begin. Columns of equal length."""

    #: Parquet: the row group of each; `None`: text.
    row_groups: Numbers | None
    #: Parquet: rows before it in its group; text: unpacked bytes before it.
    offsets: Numbers
    #: Bytes it takes; of Parquet the average of its group's texts.
    sizes: Numbers
    #: Row or line number, from 1.
    lines: Numbers

    def extent(self, file: SourceFile, at: int, last: "Places", last_at: int) -> Extent:
        """Of a chunk from row `at` here to row `last_at` of `last`."""
        assert file.uri is not None
        assert file.etag is not None
        assert file.bytes is not None
        group = None if self.row_groups is None else int(self.row_groups[at])
        offset = int(self.offsets[at])
        return Extent(
            uri=file.uri,
            etag=file.etag,
            bytes=file.bytes,
            row_group=group,
            offset=offset,
            length=int(last.offsets[last_at] + last.sizes[last_at]) - offset if group is None else None,
            line=int(self.lines[at]),
        )


def check_referable(file: SourceFile) -> None:
    """Raise `SourceError` if workers can't read this source themselves."""
    if file.uri is None:
        raise SourceError("the standard input can't be read so; leave it out, or give files.", field="by_reference")


def scan(file: SourceFile, columns: Columns, item_bytes: int, notices: Notices) -> Iterator[Places]:
    """Where the rows of a file are, in order; columns are checked on the way.

    Raises:
        SourceError: as reading the rows would, but for a single bad line of JSON, which its worker will reject.
    """
    match file.format:
        case Format.PARQUET:
            yield from _scan_parquet(file, columns, notices)
        case Format.JSONL:
            check_columns(open_blocks(file), file.name, columns, item_bytes, notices)
            yield from _scan_lines(file)
        case Format.CSV | Format.TSV:
            yield from _scan_csv(file, columns, item_bytes, notices)
        case _:
            assert_never(file.format)
    file.check_unchanged()


def _scan_parquet(file: SourceFile, columns: Columns, notices: Notices) -> Iterator[Places]:
    held: list[Places] = []
    rows = 0
    line = 1
    for group, count, average in row_groups(file, columns, notices):
        for start in range(0, count, _PLACES):
            size = min(_PLACES, count - start)
            held.append(
                Places(
                    row_groups=np.full(size, group, np.int64),
                    offsets=np.arange(start, start + size, dtype=np.int64),
                    sizes=np.full(size, average, np.int64),
                    lines=np.arange(line, line + size, dtype=np.int64),
                )
            )
            line += size
            rows += size
            if rows >= _PLACES:
                yield _joined(held)
                held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[Places]) -> Places:
    if len(held) == 1:
        return held[0]
    groups = [places.row_groups for places in held if places.row_groups is not None]
    return Places(
        row_groups=np.concatenate(groups) if groups else None,
        offsets=np.concatenate([places.offsets for places in held]),
        sizes=np.concatenate([places.sizes for places in held]),
        lines=np.concatenate([places.lines for places in held]),
    )


def _bounded(file: SourceFile) -> Iterator[bytes]:
    """The unpacked bytes of a text, for planning."""
    size = 0
    for block in unpacked_blocks(file):
        size += len(block)
        if file.compression is not Compression.NONE and size > MOST_UNPACKED_BYTES:
            raise SourceError(
                f"{file.name}: unpacks to more than {MOST_UNPACKED_BYTES:,} bytes, too much to be read by reference; "
                "unpack it, split it, or make it Parquet."
            )
        yield block


def _scan_lines(file: SourceFile) -> Iterator[Places]:
    """Lines that aren't blank, as JSON lines are read."""
    base = 0  # bytes before the block
    start = 0  # where the line at hand begins
    line = 1  # its number
    full = False  # whether a block before this one had something of it
    try:
        for block in _bounded(file):
            if base == 0:
                start = mark_bytes(block)
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == 10) + base + 1
            if len(ends):
                starts = np.concatenate(([start], ends[:-1]))
                rows = _full_lines(data, block, starts, ends, base, full)
                yield Places(
                    row_groups=None,
                    offsets=starts[rows],
                    sizes=(ends - starts)[rows],
                    lines=line + np.flatnonzero(rows),
                )
                start, line, full = int(ends[-1]), line + len(ends), False
            full = full or bool(block[max(0, start - base) :].strip())
            base += len(block)
    except BrokenStreamError as broken:
        raise SourceError(f"{file.name}: {broken.sentence(line - 1)}") from None
    if full:
        yield Places(row_groups=None, offsets=np.array([start]), sizes=np.array([base - start]), lines=np.array([line]))


def _full_lines(
    data: npt.NDArray[np.uint8], block: bytes, starts: Numbers, ends: Numbers, base: int, full: bool
) -> npt.NDArray[np.bool_]:
    """Which lines that end in a block aren't blank; `full`: the first one isn't, by what came before the block."""
    inside = np.maximum(starts - base, 0)
    rows = ~_WHITE[data[inside]]
    # A line that begins with white space is rare enough to be looked at alone.
    for at in np.flatnonzero(~rows).tolist():
        rows[at] = bool(block[inside[at] : ends[at] - base].strip())
    rows[0] |= full
    return rows


def _scan_csv(file: SourceFile, columns: Columns, item_bytes: int, notices: Notices) -> Iterator[Places]:
    """Rows by the very reader that will read them: only it knows which line ends stand inside quotes."""
    dialect = Dialect.of(file.format, columns)
    header = read_header(open_blocks(file), file.name, dialect, columns, item_bytes, notices)
    starts: list[int] = []
    sizes: list[int] = []
    lines: list[int] = []
    blocks = _bounded(file)
    first = next(blocks, b"")
    mark = mark_bytes(first)
    for start, size, line in csv_rows(chain([first[mark:]], blocks), file.name, header, item_bytes, notices):
        starts.append(mark + start)
        sizes.append(size)
        lines.append(line)
        if len(starts) == _PLACES:
            yield _text_places(starts, sizes, lines)
            starts, sizes, lines = [], [], []
    if starts:
        yield _text_places(starts, sizes, lines)


def _text_places(starts: list[int], sizes: list[int], lines: list[int]) -> Places:
    return Places(
        row_groups=None,
        offsets=np.array(starts, np.int64),
        sizes=np.array(sizes, np.int64),
        lines=np.array(lines, np.int64),
    )


def read_extent(extent: Extent, rows: int, columns: Columns, item_bytes: int) -> Iterator[Rows]:
    """The rows of a chunk, judged, in bounded memory.

    Raises:
        SourceChanged: the file is no longer the one that was planned.
        SourceError: it is damaged, or holds fewer rows there than planned.
    """
    file = source_file(extent.uri, extent.etag, extent.bytes)
    place = f"{file.name} {'row' if file.format is Format.PARQUET else 'line'} "
    left = rows
    for parsed in _parsed(file, extent, rows, columns, item_bytes):
        block = judge(parsed, item_bytes, place)
        left -= len(block.keys)
        yield block
    if left:
        raise SourceError(f"{file.name}: {abs(left):,} rows {'fewer' if left > 0 else 'more'} than were planned.")


def _parsed(file: SourceFile, extent: Extent, rows: int, columns: Columns, item_bytes: int) -> Iterator[Parsed]:
    match file.format:
        case Format.PARQUET:
            assert extent.row_group is not None
            return read_rows(file, columns, extent.row_group, extent.offset, rows, extent.line)
        case Format.JSONL:
            return read_part(_range(file, extent), file.name, columns, item_bytes, extent.line)
        case Format.CSV | Format.TSV:
            return _read_csv(file, extent, columns, item_bytes)
    assert_never(file.format)


def _read_csv(file: SourceFile, extent: Extent, columns: Columns, item_bytes: int) -> Iterator[Parsed]:
    dialect = Dialect.of(file.format, columns)
    header = read_header(open_blocks(file), file.name, dialect, columns, item_bytes, Notices())
    yield from csv_.read_part(_range(file, extent), file.name, header, columns, item_bytes, extent.line)


def _range(file: SourceFile, extent: Extent) -> Iterator[bytes]:
    assert extent.length is not None
    return open_range(file, extent.offset, extent.length)
