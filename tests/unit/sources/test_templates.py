"""Texts and titles composed of several columns, the same from every format."""

import csv
import io
import json
from datetime import date

import duckdb
import pytest

from pipeline.core.chunks import RejectCode
from pipeline.core.options import Columns
from pipeline.sources import Corpus, Rows
from pipeline.sources.by_reference import read_extent
from pipeline.sources.query import QueryCorpus
from tests.unit.sources.written import ITEM_BYTES, put, put_parquet, read, refusal, verdicts

TICKETS = Columns(template=r"{subject}\n\n{body} ({day}, {stars})", title="{subject}")
ROWS: list[dict[str, object]] = [
    {"id": 1, "subject": "Refund", "body": "Where is it?", "day": date(2026, 11, 1), "stars": 4},
    {"id": 2, "subject": None, "body": "No subject", "day": None, "stars": None},
    {"id": 3, "subject": None, "body": None, "day": None, "stars": None},
    {"id": 4, "subject": "Only", "body": None, "day": None, "stars": 5},
]
TEXTS = [b"Refund\n\nWhere is it? (2026-11-01, 4)", b"\n\nNo subject (, )", None, b"Only\n\n (, 5)"]
TITLES = [b"Refund", b"", b"", b"Only"]


def _jsonl() -> str:
    return put("t.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in ROWS))


def _parquet() -> str:
    return put_parquet("t.parquet", {name: [row[name] for row in ROWS] for name in ROWS[0]})


def _of(corpus: Corpus | QueryCorpus) -> Rows:
    (rows,) = corpus.blocks()
    return rows


def _of_query() -> Rows:
    with duckdb.connect("t.db") as connection:
        connection.execute("create table t (id int, subject text, body text, day date, stars int)")
        connection.executemany("insert into t values (?, ?, ?, ?, ?)", [list(row.values()) for row in ROWS])
    return _of(QueryCorpus("duckdb:///t.db", "select * from t order by id", TICKETS, ITEM_BYTES))


@pytest.mark.parametrize("of", ["jsonl", "parquet", "query"])
def test_texts_are_composed_alike(of: str) -> None:
    if of == "query":
        rows = _of_query()
    else:
        rows = _of(Corpus([{"jsonl": _jsonl, "parquet": _parquet}[of]()], TICKETS, ITEM_BYTES))
    assert (rows.texts, rows.titles) == (TEXTS, TITLES)
    assert rows.keys == ["1", "2", "3", "4"]
    assert verdicts(rows) == [None, None, RejectCode.MISSING_TEXT, None]


@pytest.mark.parametrize("write", [_jsonl, _parquet])
def test_workers_compose_what_they_read_themselves(write: object) -> None:
    assert callable(write)
    corpus = Corpus([write()], TICKETS, ITEM_BYTES)
    (places,) = corpus.places(corpus.files[0])
    extent = places.extent(corpus.files[0], 0, places, len(places.sizes) - 1)
    (rows,) = read_extent(extent, len(ROWS), TICKETS, ITEM_BYTES)
    assert (rows.texts, rows.titles) == (TEXTS, TITLES)


def test_an_empty_field_of_csv_is_a_text_of_its_own() -> None:
    written = io.StringIO()
    csv.writer(written).writerows([["id", "a", "b"], [1, "x", ""], [2, "", ""]])
    rows = read(put("t.csv", written.getvalue()), columns=Columns(template="{a}{b}"))
    assert rows.texts == [b"x", None]
    assert verdicts(rows)[1] is RejectCode.EMPTY_TEXT


def test_an_unknown_column_is_named() -> None:
    columns = Columns(template="{subject} {bdoy}")
    for source in (_jsonl(), _parquet()):
        assert 'no column "bdoy"; columns are id, subject, body' in refusal(source, columns=columns)


def test_a_value_that_is_no_text_rejects_its_row() -> None:
    source = put("t.jsonl", '{"a": "x", "b": ["y"]}\n{"a": "x", "b": true}\n{"a": "x", "b": 1.50}\n')
    rows = read(source, columns=Columns(template="{a} {b}"))
    assert rows.texts == [None, b"x true", b"x 1.50"]
    assert rows.problems == [(0, RejectCode.NOT_A_STRING, 'line 1: column "b" is a list, not a string or a number')]
    refused = refusal(put_parquet("t.parquet", {"a": ["x"], "b": [["y"]]}), columns=Columns(template="{a} {b}"))
    assert '"b" is list<element: string>; a template takes strings, numbers and booleans' in refused


def test_a_bad_title_rejects_its_row() -> None:
    source = put("t.jsonl", '{"text": "x", "t": "a\\u0000b"}\n{"text": "y", "t": " "}\n')
    (rows,) = Corpus([source], Columns(title="{t}"), ITEM_BYTES).blocks()
    assert rows.texts == [None, b"y"]
    assert rows.problems == [(0, RejectCode.NUL_CHARACTER, "line 1: title contains a NUL character")]
    assert rows.titles == [b"", b" "]
