"""Frames of the binary COPY format, against a reader written from Postgres' documentation."""

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.db.copy_format import frame

FIELD = st.one_of(st.none(), st.binary(max_size=9))
HEAD = np.dtype([("fields", ">i2"), ("size", ">i4"), ("number", ">i8")])


def read_rows(data: bytes) -> list[list[bytes | None]]:
    rows, at = [], 0
    while at < len(data):
        (fields,) = struct.unpack_from(">h", data, at)
        at += 2
        row: list[bytes | None] = []
        for _ in range(fields):
            (size,) = struct.unpack_from(">i", data, at)
            at += 4
            row.append(None if size == -1 else data[at : at + size])
            at += max(0, size)
        rows.append(row)
    return rows


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), FIELD, FIELD), max_size=20))
def test_what_is_framed_is_read(rows: list[tuple[int, bytes | None, bytes | None]]) -> None:
    heads = np.empty(len(rows), dtype=HEAD)
    heads["fields"], heads["size"], heads["number"] = 3, 8, [number for number, *_ in rows]
    data = frame(heads, [first for _, first, _ in rows], [second for *_, second in rows])
    assert read_rows(data) == [[struct.pack(">q", number), first, second] for number, first, second in rows]
