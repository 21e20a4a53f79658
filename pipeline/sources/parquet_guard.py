"""Validation of Parquet page headers before Arrow reads the pages: Arrow allocates as much as a header claims, and a
damaged or malicious header may claim anything.

https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, in Thrift's compact protocol.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import BinaryIO, Final

from pipeline.core.errors import SourceError
from pipeline.sources.decode import is_bomb
from pipeline.sources.source_file import SourceFile

GROWS = "the data grows over 1,000-fold; write it again with less compression."

# Fields of a PageHeader.
_KIND, _UNPACKED, _PACKED = 1, 2, 3
_DICTIONARY: Final = 2
#: By kind of page, the field with its own header, whose first field counts values; other kinds have none.
_OWN: Final = {0: 5, _DICTIONARY: 7, 3: 8}
_VALUES = 1

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 12
_MOST_FIELD = 2**15 - 1
_MOST_DEPTH = 8
_MOST_VARINT_BITS = 63
_MOST_SKIPPED_BYTES = 2**31
#: Upper bound of one header without the strings of its statistics; usual ones have about fifty bytes.
_MOST_HEADER_BYTES = 1024
#: Read at once: headers are far apart, or several come in one read.
_READ_BYTES = 64 * 1024
#: Row groups remembered as checked.
_KEPT = 4096

Fields = dict[int, "int | Fields"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Column chunk: place of a row group's column in the file, and its figures in the footer."""

    start: int
    bytes: int
    #: Values that are read: Arrow reads no page beyond them.
    values: int
    rows: int
    #: True if a row may have several values.
    repeated: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Header of a page."""

    packed_bytes: int
    unpacked_bytes: int
    values: int
    is_dictionary: bool
    #: True if the header could be parsed and the page ends within its column.
    sound: bool


_UNREADABLE = Page(0, 0, 0, is_dictionary=False, sound=False)


@lru_cache(maxsize=_KEPT)
def check_pages(file: SourceFile, columns: tuple[Stored, ...]) -> None:
    """Check the pages of a row group, up to the last value that is read; once in a process for the same values.

    It costs a read, or an object's request, for each page and each 64 KiB of small pages.

    Raises:
        SourceError: a page's header would have Arrow allocate more than the file can hold.
    """
    with file.open(_READ_BYTES) as headers:
        for column in columns:
            for page in pages(headers, column):
                if not page.sound or page.values > _most_values(page, column):
                    raise SourceError(f"{file.name}: the data is damaged; make the file again.")
                # An element of a list takes eight bytes at the least.
                if is_bomb(page.packed_bytes, max(page.unpacked_bytes, 8 * page.values if column.repeated else 0)):
                    raise SourceError(f"{file.name}: {GROWS}")


def _most_values(page: Page, column: Stored) -> float:
    """Return the most values that a page may have: one per byte in a dictionary, one per row in a flat column."""
    if page.is_dictionary:
        return page.unpacked_bytes
    return inf if column.repeated else column.rows


def pages(raw: BinaryIO, column: Stored) -> Iterator[Page]:
    """Yield the pages of a column in order, ending after one that isn't sound."""
    raw.seek(column.start)
    at, values = column.start, 0
    while at < column.start + column.bytes and values < column.values:
        header = _Header(raw)
        page = _page(header, column.start + column.bytes - at)
        yield page
        if not page.sound:
            return
        raw.seek(page.packed_bytes, os.SEEK_CUR)
        at += header.bytes + page.packed_bytes
        values += 0 if page.is_dictionary else page.values


def _page(header: "_Header", room: int) -> Page:
    """Parse the next page's header; header and page may take `room` bytes."""
    try:
        found = header.struct()
    except _NoHeaderError:
        return _UNREADABLE
    kind, packed, unpacked = found.get(_KIND), found.get(_PACKED), found.get(_UNPACKED)
    if not (isinstance(kind, int) and isinstance(packed, int) and isinstance(unpacked, int)):
        return _UNREADABLE
    own = found.get(_OWN[kind]) if kind in _OWN else {_VALUES: 0}
    values = own.get(_VALUES) if isinstance(own, dict) else None
    if not isinstance(values, int):
        return _UNREADABLE
    sound = 0 <= packed <= room - header.bytes and min(unpacked, values) >= 0
    return Page(packed, unpacked, values, kind == _DICTIONARY, sound)


class _NoHeaderError(Exception):
    """The bytes aren't a page header."""


class _Header:
    """Header at a file's current position."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        #: Bytes read or skipped so far.
        self.bytes = 0
        self._read = 0

    def struct(self, depth: int = 0) -> Fields:
        """Return 32-bit integers and structs by field, skipping other fields as Arrow does."""
        if depth > _MOST_DEPTH:
            raise _NoHeaderError
        fields: Fields = {}
        field = 0
        while (head := self._byte()) != _STOP:
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self._integer()
            if not 0 <= field <= _MOST_FIELD:
                raise _NoHeaderError
            if kind == _I32:
                fields[field] = self._integer()
            elif kind == _STRUCT:
                fields[field] = self.struct(depth + 1)
            else:
                self._pass_over(kind)
        return fields

    def _pass_over(self, kind: int) -> None:
        if kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_I16, _I64):
            self._varint()
        elif kind == _BYTE:
            self._byte()
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind not in (_TRUE, _FALSE):  # a page's header has no list, set or map
            raise _NoHeaderError

    def _integer(self) -> int:
        """Return a signed integer, decoded from zigzag."""
        found = self._varint()
        return (found >> 1) ^ -(found & 1)

    def _varint(self) -> int:
        found = 0
        for bits in range(0, _MOST_VARINT_BITS, 7):
            byte = self._byte()
            found |= (byte & 127) << bits
            if byte < 128:
                return found
        raise _NoHeaderError

    def _byte(self) -> int:
        found = self._raw.read(1)
        self._read += 1
        self.bytes += 1
        if not found or self._read > _MOST_HEADER_BYTES:
            raise _NoHeaderError
        return found[0]

    def _skip(self, count: int) -> None:
        if count > _MOST_SKIPPED_BYTES:
            raise _NoHeaderError
        self._raw.seek(count, os.SEEK_CUR)
        self.bytes += count
