"""Sources given by mistake: each is refused in a sentence, or read to its last row."""

import os
from pathlib import Path

import pytest

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus

LINE = '{"id": 1, "text": "t"}\n'


def refusal(source: str, data: bytes = b"") -> str:
    if data:
        Path(source).write_bytes(data)
    with pytest.raises(SourceError) as caught:
        for _ in Corpus([source], Columns(), 1_000).blocks():
            pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"caf\xe9.jsonl"), "caf\ufffd.jsonl"),
        ("two\nlines.jsonl", "two\ufffdlines.jsonl"),
        ("bell\x07.jsonl", "bell\ufffd.jsonl"),
    ],
)
def test_a_name_that_cannot_be_written_down(name: str, shown: str) -> None:
    sentence = "a control character, or no UTF-8, in the name; rename it."
    assert refusal(name, LINE.encode()) == f"{shown}: {sentence}"
    Path("f").mkdir()
    Path(name).rename(Path("f", name))
    assert refusal("f") == f"f/{shown}: {sentence}"


def test_an_empty_name() -> None:
    assert refusal("") == "a source is empty; give files, a folder, or - for standard input."


def test_links() -> None:
    for folder in ("f", "g"):
        Path(folder).mkdir()
        Path(folder, "a.jsonl").write_text(LINE)
    Path("f/b.jsonl").symlink_to("../g/a.jsonl")
    assert sum(len(rows.keys) for rows in Corpus(["f"], Columns(), 1_000).blocks()) == 2
    Path("f/sub").symlink_to("../g")
    assert refusal("f") == "f/sub: a link to a folder isn't followed; give the folder that it leads to."
    Path("f/sub").unlink()
    Path("f/c.jsonl").symlink_to("nowhere.jsonl")
    assert refusal("f") == "f/c.jsonl: no such file."
    Path("loop.jsonl").symlink_to("loop.jsonl")
    assert refusal("loop.jsonl") == "loop.jsonl: too many levels of symbolic links."


@pytest.mark.parametrize("folder", ["empty", "empty.jsonl", "empty.parquet"])
def test_a_folder_with_nothing_in_it(folder: str) -> None:
    Path(folder).mkdir()
    assert refusal(folder) == f"{folder}/: no .jsonl, .csv or .parquet file in it."


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", LINE.encode("utf-32"), "a.jsonl: the file is UTF-32; save it as UTF-8."),
        ("a.jsonl", LINE.encode("utf-16-le"), "a.jsonl: the file is UTF-16; save it as UTF-8."),
        ("a.csv", "text\nt\n".encode("utf-16-be"), "a.csv: the file is UTF-16; save it as UTF-8."),
        (
            "a.jsonl",
            b'{\n  "text": "t"\n}\n',
            "a.jsonl line 1: an object that goes on over the next lines; write each on one line.",
        ),
        (
            "a.csv",
            b"id;text\n1;t\n",
            "delimiter: a.csv line 1: columns are divided by semicolons; .csv is read with commas, and .tsv with tabs, "
            "unless it is set.",
        ),
        (
            "a.csv",
            LINE.encode(),
            "a.csv line 1: a JSON object, not a header; name JSON lines with .jsonl at the end.",
        ),
        ("a.tsv", b"PAR1\x15\x04", "a.tsv: not text but Parquet; give it as a file whose name ends in .parquet."),
        ("a.jsonl.gz", LINE.encode(), "a.jsonl.gz: not gzip data, as its name says; name it for what it is."),
    ],
)
def test_files_of_another_kind(name: str, data: bytes, sentence: str) -> None:
    assert refusal(name, data) == sentence


def test_columns_without_a_name_are_no_matter() -> None:
    Path("a.csv").write_text("id,,text,\n1,x,t,y\n")
    (rows,) = Corpus(["a.csv"], Columns(), 1_000).blocks()
    assert (rows.keys, rows.texts) == (["1"], [b"t"])
