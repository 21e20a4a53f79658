"""Places: positions of a file's rows, from which extents of chunks are made.

To plan Parquet, only its metadata is read. Text has no metadata: it is streamed once, and only the places of its rows
are kept, for a moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import Extent, ParquetExtent, TextExtent
from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.csv_ import Dialect, csv_rows, read_header
from pipeline.sources.decode import BrokenStreamError, mark_bytes, open_blocks, unpacked_blocks
from pipeline.sources.jsonl import check_columns
from pipeline.sources.parquet import row_groups
from pipeline.sources.source_file import Compression, Numbers, SourceFile
from pipeline.sources.validation import Notices

#: Compressed text can only be read from its beginning, which each of its chunks does: a longer one is refused.
MOST_UNPACKED_BYTES = 4 * 1024**3
#: Rows whose places are yielded at once.
_PLACES = 65_536
_WHITE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetPlaces:
    """Places of rows in a Parquet file."""

    #: Row group of each row, and the number of rows before it in that group.
    row_groups: Numbers
    offsets: Numbers
    sizes: Numbers
    #: Row numbers, from 1.
    numbers: Numbers

    def extent(self, file: SourceFile, at: int, last: "ParquetPlaces", last_at: int) -> Extent:  # noqa: ARG002
        """Return the extent, which needs no end: a chunk's rows are counted."""
        return ParquetExtent(
            **_identity(file),
            row_group=int(self.row_groups[at]),
            offset=int(self.offsets[at]),
            line=int(self.numbers[at]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlaces:
    """Places of rows in a text file."""

    #: Uncompressed bytes before each row.
    offsets: Numbers
    sizes: Numbers
    #: Line numbers, from 1.
    lines: Numbers

    def extent(self, file: SourceFile, at: int, last: "TextPlaces", last_at: int) -> Extent:
        """Return the extent up to the end of the last row."""
        offset = int(self.offsets[at])
        length = int(last.offsets[last_at] + last.sizes[last_at]) - offset
        return TextExtent(**_identity(file), offset=offset, length=length, line=int(self.lines[at]))


def _identity(file: SourceFile) -> dict[str, Any]:
    return {"uri": file.uri, "etag": file.etag, "bytes": file.bytes}


def locate_in_parquet(
    file: SourceFile, columns: Columns, _item_bytes: int, notices: Notices
) -> Iterator[ParquetPlaces]:
    """Locate rows by the file's metadata; nothing else is read."""
    held: list[ParquetPlaces] = []
    rows = 0
    line = 1
    for group, count, average in row_groups(file, columns, notices):
        for start in range(0, count, _PLACES):
            size = min(_PLACES, count - start)
            held.append(
                ParquetPlaces(
                    row_groups=np.full(size, group, np.int64),
                    offsets=np.arange(start, start + size, dtype=np.int64),
                    sizes=np.full(size, average, np.int64),
                    numbers=np.arange(line, line + size, dtype=np.int64),
                )
            )
            line += size
            rows += size
            if rows >= _PLACES:
                yield _joined(held)
                held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[ParquetPlaces]) -> ParquetPlaces:
    if len(held) == 1:
        return held[0]
    return ParquetPlaces(
        row_groups=np.concatenate([places.row_groups for places in held]),
        offsets=np.concatenate([places.offsets for places in held]),
        sizes=np.concatenate([places.sizes for places in held]),
        numbers=np.concatenate([places.numbers for places in held]),
    )


def _bounded(file: SourceFile) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a text, for planning; raise `SourceError` if a compressed one is too long."""
    size = 0
    for block in unpacked_blocks(file):
        size += len(block)
        if file.compression is not Compression.NONE and size > MOST_UNPACKED_BYTES:
            raise SourceError(
                f"{file.name}: unpacks to more than {MOST_UNPACKED_BYTES:,} bytes, too much to be read by reference; "
                "unpack it, split it, or make it Parquet."
            )
        yield block


def locate_lines(file: SourceFile, columns: Columns, item_bytes: int, notices: Notices) -> Iterator[TextPlaces]:
    """Locate the lines of JSON lines that aren't blank; a bad line is left to the worker to reject."""
    check_columns(open_blocks(file), file.name, columns, item_bytes, notices)
    yield from _full_lines_of(file)


def _full_lines_of(file: SourceFile) -> Iterator[TextPlaces]:
    base = 0  # bytes before the current block
    start = 0  # offset of the current line
    line = 1  # its number
    full = False  # True if an earlier block held a non-blank part of it
    try:
        for block in _bounded(file):
            if base == 0:
                start = mark_bytes(block)
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == 10) + base + 1
            if len(ends):
                starts = np.concatenate(([start], ends[:-1]))
                rows = _full_lines(data, block, starts, ends, base, full)
                yield TextPlaces(
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
        yield TextPlaces(offsets=np.array([start]), sizes=np.array([base - start]), lines=np.array([line]))


def _full_lines(
    data: npt.NDArray[np.uint8], block: bytes, starts: Numbers, ends: Numbers, base: int, full: bool
) -> npt.NDArray[np.bool_]:
    """Return a mask of the non-blank lines that end in a block; `full`: the first one isn't blank before the block."""
    inside = np.maximum(starts - base, 0)
    rows = ~_WHITE[data[inside]]
    # Lines that begin with white space are rare enough to be checked one by one.
    for at in np.flatnonzero(~rows).tolist():
        rows[at] = bool(block[inside[at] : ends[at] - base].strip())
    rows[0] |= full
    return rows


def locate_in_csv(file: SourceFile, columns: Columns, item_bytes: int, notices: Notices) -> Iterator[TextPlaces]:
    """Locate rows with the reader that will read them: only it knows which line ends are inside quotes."""
    dialect = Dialect.of(file, columns)
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


def _text_places(starts: list[int], sizes: list[int], lines: list[int]) -> TextPlaces:
    return TextPlaces(
        offsets=np.array(starts, np.int64),
        sizes=np.array(sizes, np.int64),
        lines=np.array(lines, np.int64),
    )
