"""The headers of Parquet's pages, looked at before a page is unpacked: memory is made ready by what they say, and what
a damaged or malicious one says has no bound.

https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, in Thrift's compact protocol.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

# Fields of a PageHeader, and the one of each kind's own header that counts values.
_UNPACKED, _PACKED = 2, 3
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8
_VALUES = 1

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_INTEGERS: Final = (4, 5, 6)
_MOST_DEPTH = 8
_MOST_VARINT_BITS = 70

Fields = dict[int, "int | Fields"]


@dataclass(frozen=True, slots=True)
class Page:
    """What the header of a page says."""

    packed_bytes: int
    unpacked_bytes: int
    values: int
    is_dictionary: bool
    #: Whether it ends where its column does, or before.
    fits: bool


class _NoHeaderError(Exception):
    """The bytes can't be read as a header."""


def pages(raw: BinaryIO, start: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk, `size` bytes from byte `start` on, as far as their headers can be read."""
    raw.seek(start)
    end = start + size
    with suppress(_NoHeaderError):
        while raw.tell() < end:
            found = _struct(raw, 0)
            own = next((found[kind] for kind in (_DATA, _DICTIONARY, _DATA_V2) if kind in found), None)
            packed, unpacked = found.get(_PACKED), found.get(_UNPACKED)
            if not (isinstance(packed, int) and isinstance(unpacked, int)):
                return
            values = own.get(_VALUES) if isinstance(own, dict) else None
            fits = 0 <= packed <= end - raw.tell()
            yield Page(packed, unpacked, values if isinstance(values, int) else 0, _DICTIONARY in found, fits)
            if not fits:
                return
            raw.seek(packed, os.SEEK_CUR)


def _struct(raw: BinaryIO, depth: int) -> Fields:
    """Numbers and structs by field; other fields are passed over."""
    if depth > _MOST_DEPTH:
        raise _NoHeaderError
    fields: Fields = {}
    field = 0
    while (head := _byte(raw)) != _STOP:
        delta, kind = head >> 4, head & 15
        field = field + delta if delta else _integer(raw)
        if kind in _INTEGERS:
            fields[field] = _integer(raw)
        elif kind == _STRUCT:
            fields[field] = _struct(raw, depth + 1)
        else:
            _pass_over(raw, kind)
    return fields


def _pass_over(raw: BinaryIO, kind: int) -> None:
    if kind == _BINARY:
        raw.seek(_varint(raw), os.SEEK_CUR)
    elif kind == _BYTE:
        _byte(raw)
    elif kind == _DOUBLE:
        raw.seek(8, os.SEEK_CUR)
    elif kind not in (_TRUE, _FALSE):  # a page's header has no list, set or map
        raise _NoHeaderError


def _integer(raw: BinaryIO) -> int:
    """A signed number, in zigzag."""
    found = _varint(raw)
    return (found >> 1) ^ -(found & 1)


def _varint(raw: BinaryIO) -> int:
    found = 0
    for bits in range(0, _MOST_VARINT_BITS, 7):
        byte = _byte(raw)
        found |= (byte & 127) << bits
        if byte < 128:
            return found
    raise _NoHeaderError


def _byte(raw: BinaryIO) -> int:
    found = raw.read(1)
    if not found:
        raise _NoHeaderError
    return found[0]
