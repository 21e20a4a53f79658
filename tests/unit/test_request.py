"""Requests for jobs: default names, and fields that are refused."""

import json
from pathlib import Path

import pytest

from pipeline.api.status import submissions
from pipeline.core.errors import UserError
from pipeline.ingest.request import ELSEWHERE, JobRequest, default_name, read_request, read_sent


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("docs.jsonl.gz", "docs"),
        ("s3://corpus/2026-11/*.parquet", "2026-11"),
        ("exports/", "exports"),
        ("-", "stdin"),
        (".", "corpus"),
        ("..", "parent"),
        ("/", "/"),
    ],
)
def test_default_names(source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "parent" / "corpus"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert default_name(source) == name
    assert read_request({"model": "m", "name": default_name(source)}).name == name


def test_the_description_refers_to_nothing_beyond_itself() -> None:
    schema = submissions.schema_of(JobRequest, ELSEWHERE)
    properties = schema["properties"]
    assert properties["dtype"]["enum"] == ["float32", "float16"]
    assert properties["precision"]["enum"] == ["auto", "float32"]
    assert "$ref" not in json.dumps(schema)
    assert not properties.keys() & {"into", "hnsw"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": ".."}, "name: \"..\" can't be a job's name: no path can hold it."),
        ({"surprise": 1}, "surprise: there is no such field."),
        ({"query": "select 1"}, "query: only vectormill submit takes it, with VECTORMILL_DATABASE_URL set."),
        ({"delimiter": "ab"}, "delimiter: give one ASCII character, or tab; as quote also none."),
        ({"delimiter": "none"}, "delimiter: give one ASCII character, or tab."),
        ({"delimiter": '"'}, "delimiter: it can't be the quote character as well."),
        ({"delimiter": "|", "quote": "|"}, "delimiter: it can't be the quote character as well."),
        ({"quote": "é"}, "quote: give one ASCII character, or tab; as quote also none."),
        ({"carry": ["a", "b", "a"]}, 'carry: "a" is given twice.'),
        ({"by_value": True}, "by_value: it is what happens without by_reference; leave it out."),
        ({"idempotency_key": "a"}, "idempotency_key: send it as the header Idempotency-Key."),
    ],
)
def test_what_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_sent({"model": "m", **fields})
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("delimiter", "quote", "read"),
    [("tab", "none", ("\t", "")), ("\\t", "'", ("\t", "'")), (";", None, (";", None)), ("\x01", "", ("\x01", ""))],
)
def test_signs(delimiter: str, quote: str | None, read: tuple[str, str | None]) -> None:
    wish = read_request({"model": "m", "delimiter": delimiter, "quote": quote})
    again = read_request(wish.model_dump())
    assert (again.columns.delimiter, again.columns.quote) == read


def test_unique_keys_demand_a_key_column() -> None:
    assert not read_request({"model": "m"}).columns.key_required
    assert read_request({"model": "m", "unique_keys": True}).columns.key_required
