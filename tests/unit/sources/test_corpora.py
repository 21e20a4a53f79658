"""Files of a corpus: discovery, fingerprint, and detection of changes."""

import os

import pytest

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus, formats
from tests.unit.sources.written import GOOD, ITEM_BYTES, TWO, put, refusal


def test_a_folder_is_read_in_order_of_names() -> None:
    for name in ("f/b.jsonl", "f/a/z.NDJSON", "f/c.csv", "f/.hidden.jsonl", "f/.git/a.jsonl", "f/readme.md"):
        put(name, "text\nt" if name.endswith("csv") else GOOD)
    corpus = Corpus(["f"], Columns(), ITEM_BYTES)
    assert [(file.name, file.format) for file in corpus.files] == [
        ("f/a/z.NDJSON", formats.JSONL),
        ("f/b.jsonl", formats.JSONL),
        ("f/c.csv", formats.CSV),
    ]
    assert corpus.files[0].bytes == len(GOOD)


def test_a_folder_with_nothing_to_read() -> None:
    put("f/readme.md", "")
    assert refusal("f") == "f/: no .jsonl, .csv or .parquet file in it."
    assert refusal("f/") == "f/: no .jsonl, .csv or .parquet file in it."


def test_a_file_given_twice() -> None:
    put("f/a.jsonl", GOOD)
    assert refusal("f", "f/../f/a.jsonl") == "f/../f/a.jsonl: given twice."


def test_a_pipe_is_no_file() -> None:
    os.mkfifo("a.jsonl")
    assert refusal("a.jsonl") == ("a.jsonl: not a regular file; pipe JSON lines to the standard input, named -.")


def test_the_fingerprint_follows_files_and_columns() -> None:
    put("a.jsonl", GOOD)

    def fingerprint(columns: Columns) -> str | None:
        return Corpus(["a.jsonl"], columns, ITEM_BYTES).fingerprint()

    found = [fingerprint(Columns()), fingerprint(TWO), fingerprint(Columns(carry=("a",)))]
    os.utime("a.jsonl", ns=(1, 1))
    found.append(fingerprint(Columns()))
    assert len(set(found)) == 4
    assert fingerprint(Columns()) == found[-1]


def test_a_file_that_changes_is_refused() -> None:
    corpus = Corpus([put("a.jsonl", GOOD)], Columns(), ITEM_BYTES)
    put("a.jsonl", GOOD * 2)
    with pytest.raises(SourceError, match=r"/a\.jsonl: the file changed after it was listed; submit it again\.$"):
        list(corpus.blocks())
