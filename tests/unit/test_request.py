"""What a door is asked for: names, and fields that are none."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.request import default_name, read_request


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


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": ".."}, "name: \"..\" can't be a job's name: no path can hold it."),
        ({"surprise": 1}, "surprise: there is no such field."),
        ({"query": "select 1"}, "query: only vectormill submit takes it, with VECTORMILL_DATABASE_URL set."),
        ({"by_value": True}, "by_value: it is what happens without by_reference; leave it out."),
        ({"idempotency_key": "a"}, "idempotency_key: send it as the header Idempotency-Key."),
    ],
)
def test_what_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_request({"model": "m", **fields})
    assert str(raised.value) == told
