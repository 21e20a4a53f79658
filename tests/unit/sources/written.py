"""Helpers to write corpora and to read them."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus, Rows
from pipeline.sources.validation import BLOCK_ROWS

ITEM_BYTES = 1000
DEFAULT = Columns()
TWO = Columns(text="body", key="id")
MIB = 1024 * 1024
GOOD = '{"text": "t"}\n'


def read(
    *sources: str,
    columns: Columns = DEFAULT,
    item_bytes: int = ITEM_BYTES,
    stdin: bytes = b"",
) -> Rows:
    """Return the whole corpus as one block."""
    corpus = Corpus(sources, columns, item_bytes, io.BytesIO(stdin))
    keys: list[str | None] = []
    texts: list[bytes | None] = []
    problems: list[tuple[int, RejectCode, str]] = []
    carried: list[bytes] = []
    for rows in corpus.blocks():
        assert len(rows.keys) == len(rows.texts) <= BLOCK_ROWS
        assert [at for at, text in enumerate(rows.texts) if text is None] == [at for at, *_ in rows.problems]
        problems += [(len(keys) + at, code, message) for at, code, message in rows.problems]
        keys += rows.keys
        texts += rows.texts
        carried += rows.carried or []
    return Rows(keys, texts, problems, carried if columns.carry else None)


def refusal(*sources: str, columns: Columns = DEFAULT, item_bytes: int = ITEM_BYTES) -> str:
    """Return the error message of a corpus that must be refused."""
    with pytest.raises(SourceError) as caught:
        read(*sources, columns=columns, item_bytes=item_bytes)
    return str(caught.value)


def put(name: str, data: bytes | str) -> str:
    """Write a file, and return its name."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def put_parquet(name: str, columns: dict[str, Any], **options: Any) -> str:
    """Write a Parquet file, and return its name."""
    pq.write_table(pa.table(columns), name, **options)
    return name


def verdicts(rows: Rows) -> list[RejectCode | None]:
    """Return the reject code of each row, None where the row is good."""
    found = {at: code for at, code, _ in rows.problems}
    return [found.get(at) for at in range(len(rows.keys))]
