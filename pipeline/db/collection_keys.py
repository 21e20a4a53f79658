"""Keys of a collection, compared with the rows of a sync."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, text

from pipeline.db.arrays import ByteaArray, TextArray, take_arrays
from pipeline.db.database import errors_as_sqlalchemys, psycopg_connection

# One number a row: slot times four, plus the relation; -1: the version hasn't the key.
_COMPARE = """
    select array_send(coalesce(array_agg(coalesce(
             k.slot * 4 + case when k.identity = given.identity then 0
                               when substr(k.identity, 1, 16) = substr(given.identity, 1, 16) then 1
                               else 2 end, -1)), '{}')),
           array_send(coalesce(array_agg(coalesce(k.tokens, 0)::bigint), '{}'))
    from unnest(%s, %s) given(key, identity)
    -- "offset 0" keeps it a look-up for each key, in the order of the rows.
    left join lateral (select slot, identity, tokens from vectormill.collection_keys k
                       where k.version_id = %s and k.key = given.key offset 0) k on true
"""
#: Head of an array in binary form, before its elements: dimensions, flag of nulls, type, length, lower bound.
_HEAD_BYTES = 20
_ELEMENT = np.dtype([("size", ">i4"), ("value", ">i8")])

Numbers = npt.NDArray[np.int64]
#: Relations of a row to the key that the collection has.
SAME, OTHER_COLUMNS, OTHER_TEXT = 0, 1, 2


class Known(NamedTuple):
    """Rows whose key a version has, as columns, in the order of the rows."""

    #: Positions of the rows.
    at: Numbers
    slots: Numbers
    #: `SAME`, `OTHER_COLUMNS` or `OTHER_TEXT`.
    relations: Numbers
    #: Tokens of the text that the version has.
    tokens: Numbers


def compare(connection: Connection, version_id: int, keys: Sequence[str], identities: Sequence[bytes]) -> Known:
    """Compare rows, by key and identity, with a version. Return those whose key it has."""
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor(binary=True) as cursor:
        take_arrays(cursor)
        # Or else the rows would be written to disk for the join.
        cursor.execute("set local work_mem = '64MB'")
        texts = TextArray([key.encode() for key in keys])
        cursor.execute(_COMPARE, (texts, ByteaArray(identities), version_id))
        row = cursor.fetchone()
    assert row is not None
    found, tokens = (np.frombuffer(column[_HEAD_BYTES:], _ELEMENT)["value"].astype(np.int64) for column in row)
    at = np.flatnonzero(found >= 0)
    return Known(at, found[at] // 4, found[at] % 4, tokens[at])


def count_keys(connection: Connection, version_id: int) -> int:
    """Return the number of a version's keys."""
    found = text("select count(*) from vectormill.collection_keys where version_id = :version")
    return int(connection.execute(found, {"version": version_id}).scalar_one())
