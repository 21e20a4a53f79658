"""Keys and carried values: one value gives the same key by each way of input."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.options import Columns
from pipeline.sources import Corpus, Rows
from pipeline.sources.batch_lines import BatchLines
from pipeline.sources.by_reference import read_extent
from pipeline.sources.query import QueryCorpus
from pipeline.sources.upload import Upload, UploadedCorpus

COLUMNS = Columns(carry=("kept",))
ITEM_BYTES = 1_000


class Value(NamedTuple):
    """Value as each input that has its type writes it."""

    key: str
    #: The carried value, as JSON.
    carried: str
    postgres: str
    duckdb: str | None
    #: Value and type of Arrow's column.
    arrow: tuple[Any, pa.DataType] | None
    #: The value in a JSON source.
    json: str


def written_out(key: str, postgres: str, duckdb: str | None, arrow: Any, kind: pa.DataType | None) -> Value:
    return Value(key, json.dumps(key), postgres, duckdb, None if kind is None else (arrow, kind), json.dumps(key))


UUID_TEXT = "0198c0de-0000-7000-8000-00000000000a"
NOON = datetime(2026, 11, 23, 12, tzinfo=timezone(timedelta(hours=2)))
VALUES = {
    "string": written_out("a b", "'a b'::text", "'a b'", "a b", pa.string()),
    "integer": Value("7", "7", "7::bigint", "7::bigint", (7, pa.int64()), "7"),
    "past 64 bits": Value(str(2**70), str(2**70), f"'{2**70}'::jsonb", f"{2**70}::hugeint", None, str(2**70)),
    "whole float": Value("1", "1.0", "1::float8", "1::double", (1.0, pa.float64()), "1"),
    "float": Value("0.1", "0.1", "0.1::float8", "0.1::double", (0.1, pa.float64()), "0.1"),
    "float of 32 bits": Value("0.1", "0.1", "0.1::real", None, (0.1, pa.float32()), "0.1"),
    "long float": Value("1" + "0" * 20, "1e+20", "1e20::float8", "1e20::double", (1e20, pa.float64()), "1" + "0" * 20),
    "boolean": Value("true", "true", "true", "true", (True, pa.bool_()), "true"),
    "decimal": written_out("1.50", "1.50::numeric(9, 2)", "1.50::decimal(9, 2)", Decimal("1.50"), pa.decimal128(9, 2)),
    "small decimal": written_out(
        "0.00000001", "0.00000001::numeric", "0.00000001::decimal(18, 8)", Decimal("0.00000001"), pa.decimal128(18, 8)
    ),
    "uuid": written_out(UUID_TEXT, f"'{UUID_TEXT}'::uuid", f"'{UUID_TEXT}'::uuid", UUID(UUID_TEXT).bytes, pa.uuid()),
    "date": written_out("2026-11-23", "'2026-11-23'::date", "'2026-11-23'::date", date(2026, 11, 23), pa.date32()),
    "time": written_out(
        "10:00:00.500000", "'10:00:00.5'::time", "'10:00:00.5'::time", time(10, 0, 0, 500_000), pa.time64("us")
    ),
    "timestamp": written_out(
        "2026-11-23T10:00:00",
        "'2026-11-23 10:00'::timestamp",
        "'2026-11-23 10:00'::timestamp",
        datetime(2026, 11, 23, 10),
        pa.timestamp("ns"),
    ),
    "moment": written_out(
        "2026-11-23T10:00:00+00:00",
        "'2026-11-23 12:00+02'::timestamptz",
        "'2026-11-23 12:00+02'::timestamptz",
        NOON.astimezone(UTC),
        pa.timestamp("us", "Europe/Berlin"),
    ),
    "interval": written_out(
        "2 days 03:00:00",
        "'2 days 3 hours'::interval",
        "interval '2 days 3 hours'",
        timedelta(days=2, hours=3),
        pa.duration("ms"),
    ),
    "interval of months": written_out("1 year 2 mons", "'14 months'::interval", None, None, None),
    "inet": written_out("10.0.0.1", "'10.0.0.1'::inet", None, None, None),
    "network": written_out("10.0.0.0/8", "'10.0.0.0/8'::cidr", None, None, None),
    "number in jsonb": Value("1.50", "1.50", "'1.50'::jsonb", None, None, "1.50"),
}


def queried(url: str, expression: str) -> Iterator[Rows]:
    query = f"select {expression} as id, {expression} as kept, 'x' as text"
    return QueryCorpus(url, query, COLUMNS, ITEM_BYTES).blocks()


def by_reference(path: Path) -> Iterator[Rows]:
    corpus = Corpus([str(path)], COLUMNS, ITEM_BYTES)
    for places in corpus.places(corpus.files[0]):
        yield from read_extent(places.extent(corpus.files[0], 0, places, 0), 1, COLUMNS, ITEM_BYTES)


def as_batch(key: str) -> Iterator[Rows]:
    request = {"custom_id": key, "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}}
    data = json.dumps(request).encode()
    return BatchLines(
        "a", "file:a", hashlib.sha256(data).hexdigest(), len(data), lambda: io.BytesIO(data), 1_000
    ).blocks()


def uploaded(path: Path) -> Iterator[Rows]:
    return UploadedCorpus([Upload("sent", path, "0" * 64)], COLUMNS, ITEM_BYTES).blocks()


def files_of(value: Value, folder: Path) -> dict[str, Path]:
    """Write the value to a file of each format, with its type where the format has it, else as its text."""
    files = {name: folder / f"a.{name}" for name in ("jsonl", "csv", "tsv")}
    files["jsonl"].write_text(f'{{"id": {value.json}, "kept": {value.json}, "text": "x"}}')
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with files[name].open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "kept", "text"], [value.key, value.key, "x"]])
    if value.arrow:
        files["parquet"] = folder / "a.parquet"
        column = pa.array([value.arrow[0]], value.arrow[1])
        pq.write_table(pa.table({"id": column, "kept": column, "text": ["x"]}), files["parquet"])
    if value.duckdb and "hugeint" not in value.duckdb:  # DuckDB writes a hugeint as a float
        files["duckdb.parquet"] = folder / "b.parquet"
        select = f"select {value.duckdb} as id, {value.duckdb} as kept, 'x' as text"
        duckdb.sql(f"copy ({select}) to '{files['duckdb.parquet']}' (format parquet)")
    return files


@pytest.mark.parametrize("name", VALUES)
def test_a_value_has_one_key_by_each_way(database: str, tmp_path: Path, name: str) -> None:
    value = VALUES[name]
    found: dict[str, Rows] = {}
    found["query"] = next(queried(database, value.postgres))
    found["query in another time zone"] = next(
        queried(f"{database}?options=-c%20timezone%3DAsia/Tokyo", value.postgres)
    )
    if value.duckdb:
        duckdb.connect(str(tmp_path / "a.db")).close()
        found["query of duckdb"] = next(queried(f"duckdb:///{tmp_path}/a.db", value.duckdb))
    for kind, path in files_of(value, tmp_path).items():
        found[kind] = next(Corpus([str(path)], COLUMNS, ITEM_BYTES).blocks())
        found[f"{kind} by reference"] = next(by_reference(path))
        found[f"{kind} uploaded"] = next(uploaded(path))
    assert {way: rows.keys[0] for way, rows in found.items()} == dict.fromkeys(found, value.key)
    assert next(as_batch(value.key)).keys == [value.key]
    as_written = {way: rows for way, rows in found.items() if way.startswith("jsonl")}
    typed = {way: rows for way, rows in found.items() if "quer" in way or "parquet" in way}
    for ways, written in ((typed, value.carried), (as_written, value.json)):
        assert {way: (rows.carried or [b""])[0].decode() for way, rows in ways.items()} == dict.fromkeys(
            ways, f'{{"kept":{written}}}'
        )


STRAY = [("1", "plain"), ("2", '"one stray quote'), ("3", "three"), ("4", 'five inches: 5"'), ("5", "sep=;")]


def test_a_stray_quote_swallows_no_row_by_any_way(database: str, tmp_path: Path) -> None:
    """Writers that quote, such as `csv`, quote these rows in CSV; TSV holds them unquoted."""
    made = {kind: tmp_path / f"stray.{kind}" for kind in ("tsv", "csv", "jsonl", "parquet")}
    made["tsv"].write_text("".join(f"{key}\t{text}\n" for key, text in [("id", "text"), *STRAY]))
    with made["csv"].open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *STRAY])
    made["jsonl"].write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in STRAY))
    pq.write_table(pa.table({"id": [key for key, _ in STRAY], "text": [text for _, text in STRAY]}), made["parquet"])
    listed = ", ".join(f"('{key}', '{text}')" for key, text in STRAY)
    query = f"select * from (values {listed}) as stray (id, text)"
    lines = [json.loads(line) for line in made["jsonl"].read_text().splitlines()]
    requests = b"".join(
        json.dumps(
            {
                "custom_id": line["id"],
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": "m", "input": line["text"]},
            }
        ).encode()
        + b"\n"
        for line in lines
    )
    corpora: dict[str, Any] = {
        "query": QueryCorpus(database, query, Columns(), ITEM_BYTES),
        "batch": BatchLines("a", "file:a", "0" * 64, len(requests), lambda: io.BytesIO(requests), ITEM_BYTES),
        **{kind: Corpus([str(path)], Columns(), ITEM_BYTES) for kind, path in made.items()},
        **{
            f"{kind} uploaded": UploadedCorpus([Upload("sent", path, "0" * 64)], Columns(), ITEM_BYTES)
            for kind, path in made.items()
        },
    }
    for way, corpus in corpora.items():
        rows = [pair for block in corpus.blocks() for pair in zip(block.keys, block.texts, strict=True)]
        assert rows == [(key, text.encode()) for key, text in STRAY], way
        assert corpus.notices.lines() == [], way
