"""Rows in Postgres' binary COPY format, built from numpy arrays and lists of bytes.

Format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format). Every integer is big-endian; a field is
its length as int32, then its bytes; length -1 is NULL.
"""

from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"


#: Payloads that `bytes.join` takes.
Buffer = bytes | memoryview
Sliceable = TypeVar("Sliceable", bytes, memoryview)


def _lengths(payloads: Sequence[bytes | None]) -> list[bytes]:
    lengths = np.fromiter((-1 if p is None else len(p) for p in payloads), dtype=">i4", count=len(payloads))
    return _slices(lengths.tobytes(), 4)


def _slices(data: Sliceable, size: int) -> list[Sliceable]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def frame(fixed: npt.NDArray[np.void], *variable: Sequence[bytes | None]) -> bytes:
    """Return one COPY row for each element of `fixed`, each followed by its fields of variable length.

    `fixed` is a packed structured array that starts with the row's number of fields (`>i2`) and holds each field of
    fixed size as its length (`>i4`) and value. Each of `variable` has one payload per row, `None` for NULL.
    """
    if len(fixed) == 0:
        return b""
    # Views, so that only the join copies bytes.
    columns: list[Sequence[Buffer]] = [_slices(fixed.view(np.uint8).data, fixed.dtype.itemsize)]
    for payloads in variable:
        columns += [_lengths(payloads), [p or b"" for p in payloads]]
    return b"".join(chain.from_iterable(zip(*columns, strict=True)))
