"""Arrays of many strings as parameters of a query, in Postgres' binary form.

The driver writes an array element by element, which takes longer than the query that reads it. The form: int32 number
of dimensions, flag of nulls, type of the elements, length and lower bound, then each element as in COPY.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import psycopg
from psycopg.adapt import Dumper
from psycopg.postgres import types
from psycopg.pq import Format


@dataclass(frozen=True, slots=True)
class TextArray:
    """Parameter of type text[], as UTF-8."""

    values: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class ByteaArray:
    """Parameter of type bytea[]."""

    values: Sequence[bytes]


class _ArrayDumper(Dumper):
    format = Format.BINARY
    element_oid: int

    def dump(self, array: TextArray | ByteaArray) -> bytes:
        values = array.values
        if not values:
            return struct.pack(">iii", 0, 0, self.element_oid)
        sizes = np.fromiter(map(len, values), ">i4", len(values)).tobytes()
        lengths = (sizes[at : at + 4] for at in range(0, len(sizes), 4))
        head = struct.pack(">iiiii", 1, 0, self.element_oid, len(values), 1)
        return head + b"".join(chain.from_iterable(zip(lengths, values, strict=True)))


class _TextArrayDumper(_ArrayDumper):
    oid = types["text"].array_oid
    element_oid = types["text"].oid


class _ByteaArrayDumper(_ArrayDumper):
    oid = types["bytea"].array_oid
    element_oid = types["bytea"].oid


def take_arrays(cursor: "psycopg.Cursor[tuple[object, ...]]") -> None:
    """Let a cursor take these arrays as parameters."""
    cursor.adapters.register_dumper(TextArray, _TextArrayDumper)
    cursor.adapters.register_dumper(ByteaArray, _ByteaArrayDumper)
