"""Errors about broken files and missing columns, one sentence each."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.chunks import RejectCode
from pipeline.core.options import Columns
from tests.unit.sources.written import GOOD, MIB, put, put_parquet, read, refusal, verdicts


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", GOOD + '{"text": x}', "a.jsonl line 2: not valid JSON (expecting value at column 10)."),
        (
            "a.jsonl",
            '{"text": "t',
            "a.jsonl line 1: not valid JSON (unterminated string starting at column 10).",
        ),
        (
            "a.jsonl",
            '{"text": "\t"}',
            "a.jsonl line 1: not valid JSON (invalid control character at column 11).",
        ),
        ("a.jsonl", '{"text": NaN}', "a.jsonl line 1: not valid JSON (NaN is no JSON; write null)."),
        ("a.jsonl", GOOD + "[" * 99999, "a.jsonl line 2: not valid JSON (nested too deeply)."),
        ("a.jsonl", GOOD + "7", "a.jsonl line 2: not a JSON object; write one object per line."),
        ("a.jsonl", GOOD + '["text"]', "a.jsonl line 2: not a JSON object; write one object per line."),
        (
            "a.jsonl",
            '\n [\n{"text": "t"}]',
            "a.jsonl: a JSON array, not JSON lines; write each object on a line of its own.",
        ),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl: the file is UTF-16; save it as UTF-8."),
        ("a.csv", "text\nt\n".encode("utf-16"), "a.csv: the file is UTF-16; save it as UTF-8."),
        ("a.csv", "", "a.csv line 1: no header; name the columns there."),
        ("a.csv", "\ntext\n", "a.csv line 1: no header; name the columns there."),
        ("a.csv", "text,a,a\n", 'a.csv line 1: the column "a" stands twice in the header; rename one.'),
        ("a.csv", 'text,a\n"\n",1\n1,2,3\n', "a.csv line 4: 3 fields where the header has 2."),
        ("a.csv", "text,a\n1\n", "a.csv line 2: 1 field where the header has 2."),
        ("a.csv", 'text\nt\n"t\nt\n', "a.csv line 3: a quote opened there is never closed."),
        (
            "a.csv",
            'text\n"a"b\n',
            'a.csv line 2: a closing quote inside a field; write quotes within a field twice, as "".',
        ),
        (
            "a.csv",
            'text\nt\n"' + "x\n" * 3 * MIB,
            "a.csv line 3: the row is longer than 4,210,304 bytes; is a quote there never closed?",
        ),
        (
            "a.csv",
            'text\n"' + "x" * 5 * MIB,
            "a.csv line 2: the row is longer than 4,210,304 bytes; is a quote there never closed?",
        ),
        (
            "a.csv",
            "text\nt\n" + '"\n",' * 2 * MIB,
            "a.csv line 3: the row is longer than 4,210,304 bytes; is a quote there never closed?",
        ),
        ("a.parquet", "hello", "a.parquet: not a Parquet file."),
        ("a.parquet", "", "a.parquet: not a Parquet file."),
        (
            "a.parquet",
            "PAR1 and no more",
            "a.parquet: the Parquet footer can't be read; the file is truncated or damaged.",
        ),
        ("a.jsonl.gz", "", "a.jsonl.gz: the gzip data ends early after line 0; the file is truncated."),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz: not gzip data, as its name says; name it for what it is."),
        ("a.csv.zst", "no zstd", "a.csv.zst: not zstd data, as its name says; name it for what it is."),
        (
            "a.json",
            "{}",
            "a.json: unknown kind of file; .jsonl, .ndjson, .csv, .tsv and .parquet are read, "
            "all but .parquet also with .gz or .zst.",
        ),
    ],
)
def test_broken_files(name: str, data: bytes | str, sentence: str) -> None:
    assert refusal(put(name, data)) == sentence


@pytest.mark.parametrize("name", ["a.jsonl", "a.gz", "a.parquet", "nowhere/"])
def test_no_such_file(name: str) -> None:
    assert refusal(name) == f"{name}: no such file."


@pytest.mark.parametrize(
    ("line", "columns", "field", "sentence"),
    [
        (
            '{"id": "1", "body": "t"}',
            Columns(),
            "text_column",
            'no column "text"; columns are id, body. Name "body".',
        ),
        (
            '{"a": "t", "b": "t", "c": 1}',
            Columns(),
            "text_column",
            'no column "text"; columns are a, b, c. Name another.',
        ),
        ("{}", Columns(), "text_column", 'no column "text"; there is none at all. Name another.'),
        (
            '{"text": "t"}',
            Columns(key="k", key_required=True),
            "key_column",
            'no column "k"; columns are text. Name another.',
        ),
        (
            '{"text": "t"}',
            Columns(carry=("c",)),
            "carry",
            'no column "c"; columns are text. Name another.',
        ),
    ],
)
def test_wrong_columns_of_json_lines(line: str, columns: Columns, field: str, sentence: str) -> None:
    told = refusal(put("a.jsonl", "\n" + f"{line}\n" * 3), columns=columns)
    assert told == f"{field}: a.jsonl line 2: {sentence}"


def test_a_column_that_comes_late() -> None:
    late = '{"body": "t"}\n' * 999 + GOOD
    assert verdicts(read(put("a.jsonl", late))) == [RejectCode.MISSING_TEXT] * 999 + [None]
    sentence = 'text_column: a.jsonl line 1: no column "text"; columns are body. Name "body".'
    assert refusal(put("a.jsonl", '{"body": "t"}\n' + late)) == sentence


def test_wrong_columns_of_csv() -> None:
    put("a.csv", "id,body\n1,t\n")
    sentence = 'text_column: a.csv line 1: no column "text"; columns are id, body. Name "body".'
    assert refusal("a.csv") == sentence
    columns = Columns(text="body", key="k", key_required=True)
    sentence = 'key_column: a.csv line 1: no column "k"; columns are id, body. Name another.'
    assert refusal("a.csv", columns=columns) == sentence


def test_many_and_odd_columns_are_shortened() -> None:
    put("a.csv", ",".join(["a\x07", "x" * 50, *(str(at) for at in range(28))]))
    listed = ", ".join(["a\ufffd", "x" * 40 + "…", *(str(at) for at in range(18)), "and 10 more"])
    sentence = f'text_column: a.csv line 1: no column "text"; columns are {listed}. Name another.'
    assert refusal("a.csv") == sentence


@pytest.mark.parametrize(
    ("table", "columns", "field", "sentence"),
    [
        (
            {"id": [1], "body": ["t"]},
            Columns(),
            "text_column",
            'no column "text"; columns are id, body. Name "body".',
        ),
        (
            {"text": [1]},
            Columns(),
            "text_column",
            'column "text" is int64, not a string; name a string column.',
        ),
        (
            {"text": [b"t"]},
            Columns(),
            "text_column",
            'column "text" is binary, not a string; name a string column.',
        ),
        (
            {"text": ["t"], "id": [[1]]},
            Columns(),
            "key_column",
            'column "id" is list<element: int64>; a key is a string, a number or a boolean. Name another.',
        ),
        (
            {"text": ["t"], "a": [b"x"]},
            Columns(carry=("a",)),
            "carry",
            'column "a" is binary, which can\'t be carried; leave it out.',
        ),
        (
            {"text": ["t"]},
            Columns(key="k", key_required=True),
            "key_column",
            'no column "k"; columns are text. Name another.',
        ),
    ],
)
def test_wrong_columns_of_parquet(table: dict[str, Any], columns: Columns, field: str, sentence: str) -> None:
    assert refusal(put_parquet("a.parquet", table), columns=columns) == f"{field}: a.parquet: {sentence}"


def test_a_parquet_column_that_stands_twice() -> None:
    pq.write_table(pa.table([["t"], ["t"]], names=["text", "text"]), "a.parquet")
    assert refusal("a.parquet") == 'a.parquet: the column "text" stands twice in the schema; rename one.'


@pytest.mark.parametrize(("start", "place"), [(4, ""), (400, " row 1")], ids=["a page's header", "its data"])
def test_damaged_parquet_pages(start: int, place: str) -> None:
    put_parquet("a.parquet", {"text": [f"text {at}" for at in range(5000)]}, compression="zstd")
    data = bytearray(Path("a.parquet").read_bytes())
    data[start:2000] = b"\xff" * (2000 - start)
    Path("a.parquet").write_bytes(data)
    assert refusal("a.parquet") == f"a.parquet{place}: the data is damaged; make the file again."
