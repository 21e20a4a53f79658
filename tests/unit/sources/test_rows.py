"""Round trip of a corpus: rows come back as they were written, and each bad one is classified."""

import csv
import json
import os
from collections.abc import Sequence

import orjson
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.chunks import RejectCode
from pipeline.core.options import Columns
from pipeline.sources import Rows
from tests.unit.sources.written import ITEM_BYTES, put, put_parquet, read, verdicts


def expected(text: object, key: object) -> tuple[str | None, RejectCode | None]:
    """Return the key to keep and the verdict, by the contract in other words than the code's."""
    verdict = None
    if text is None:
        verdict = RejectCode.MISSING_TEXT
    elif not isinstance(text, str):
        verdict = RejectCode.NOT_A_STRING
    elif any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        verdict = RejectCode.INVALID_UTF8
    elif len(text.encode()) > ITEM_BYTES:
        verdict = RejectCode.TOO_LARGE
    elif "\0" in text:
        verdict = RejectCode.NUL_CHARACTER
    elif not text.strip():
        verdict = RejectCode.EMPTY_TEXT
    kept: str | None = {True: "true", False: "false"}[key] if isinstance(key, bool) else str(key)
    if key is None:
        kept = None
    elif isinstance(key, list | dict) or "\0" in str(kept) or len(os.fsencode(str(kept))) > 1024:
        kept, verdict = None, verdict or RejectCode.BAD_KEY
    return kept, verdict


def check(rows: Rows, written: Sequence[tuple[object, object]]) -> None:
    wanted = [expected(text, key) for text, key in written]
    assert verdicts(rows) == [verdict for _, verdict in wanted]
    assert rows.keys == [kept for kept, _ in wanted]
    good = [text for (text, _), (_, verdict) in zip(written, wanted, strict=True) if verdict is None]
    assert [text.decode() for text in rows.texts if text is not None] == good


strings = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.sampled_from(["", " \n", "\u3000", "\x1f", "x" * 1000, "x" * 1001, "é" * 501, "a\0b", '"', "\\u0000", "\ufeff"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
values = st.one_of(strings, strings, scalars, st.just("\ud800"), st.lists(st.integers()), st.just({"a": 1}))
keys = st.one_of(strings, scalars, st.lists(st.integers()))
rounds = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@rounds
@given(st.lists(st.tuples(values, keys), max_size=20), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_json_lines_come_back(written: list[tuple[object, object]], end: str, last: bool) -> None:
    lines = [json.dumps({"id": key, "text": text}) for text, key in written]
    check(read("-", stdin=(end.join(lines) + end * last).encode()), written)


@rounds
@given(st.lists(st.tuples(strings, strings), max_size=20), st.sampled_from([",", "\t"]))
def test_csv_comes_back(written: list[tuple[str, str]], delimiter: str) -> None:
    name = "a.csv" if delimiter == "," else "a.tsv"
    with open(name, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["text", "other", "id"])
        writer.writerows([text, "…", key] for text, key in written)
    check(read(name, columns=Columns(quote='"')), [(text, key or None) for text, key in written])


@rounds
@given(
    st.lists(st.tuples(st.one_of(st.none(), strings), st.one_of(st.none(), strings)), max_size=20),
    st.sampled_from([pa.string(), pa.large_string(), pa.string_view()]),
    st.booleans(),
    st.integers(1, 7),
)
def test_parquet_comes_back(
    written: list[tuple[str | None, str | None]], kind: pa.DataType, folded: bool, group: int
) -> None:
    text, key = (pa.array([row[at] for row in written], kind) for at in (0, 1))
    if folded and kind == pa.string():
        text, key = text.dictionary_encode(), key.dictionary_encode()
    put_parquet("a.parquet", {"id": key, "text": text}, row_group_size=group, use_dictionary=folded)
    check(read("a.parquet"), written)


@pytest.mark.parametrize(
    ("kind", "given", "stored"),
    [
        (pa.int64(), [-5, 2**62, None], ["-5", str(2**62), None]),
        (pa.uint64(), [2**64 - 1], [str(2**64 - 1)]),
        (pa.float64(), [1.0, 0.1, float("nan")], ["1", "0.1", None]),
        (pa.float16(), [1.5], ["1.5"]),
        (pa.bool_(), [True, False, None], ["true", "false", None]),
        (pa.null(), [None], [None]),
    ],
)
def test_keys_of_parquet(kind: pa.DataType, given: list[object], stored: list[str | None]) -> None:
    put_parquet("a.parquet", {"id": pa.array(given, kind), "text": ["t"] * len(given)})
    assert read("a.parquet").keys == stored


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("7", "7"),
        (str(2**70), str(2**70)),
        (f"-{2**64}", f"-{2**64}"),
        ("1.5", "1.5"),
        ("true", "true"),
        ('""', ""),
        ("9" * 5000, None),
        ("1.0", "1.0"),
        ("-0", "-0"),
        ("1e999", "1e999"),
        ('"\\ud800"', None),
        ("{}", None),
        (f'"{"é" * 512}"', "é" * 512),
        (f'"{"é" * 513}"', None),
    ],
)
def test_keys_of_json_lines(given: str, stored: str | None) -> None:
    rows = read("-", stdin=f'{{"text": "t", "id": {given}}}'.encode())
    assert rows.keys == [stored]
    assert verdicts(rows) == [None if stored is not None else RejectCode.BAD_KEY]


def test_a_row_without_key_has_none() -> None:
    assert read("-", stdin=b'{"text": "t"}').keys == [None]
    assert read(put("a.csv", "text\nt\n")).keys == [None]
    assert read(put_parquet("a.parquet", {"text": ["t"]})).keys == [None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"id": 1}', "line 2: text is missing"),
        (b'{"text": null}', "line 2: text is null"),
        (b'{"text": 5}', "line 2: text is a number, not a string"),
        (b'{"text": 5.5}', "line 2: text is a number, not a string"),
        (b'{"text": true}', "line 2: text is a boolean, not a string"),
        (b'{"text": ["secret"]}', "line 2: text is a list, not a string"),
        (b'{"text": {"secret": 1}}', "line 2: text is an object, not a string"),
        (b'{"text": ""}', "line 2: text is empty"),
        (b'{"text": " \\n\\u3000"}', "line 2: text is only white space"),
        (b'{"text": "secret \\ud800"}', "line 2: text is not valid UTF-8"),
        (b'{"text": "secret \xff"}', "line 2: text is not valid UTF-8"),
        (b'{"text": "secret \\u0000"}', "line 2: text contains a NUL character"),
        (b'{"text": "' + b"x" * 1001 + b'"}', "line 2: text has 1,001 bytes; at most 1,000 are allowed"),
        (b'{"text": "t", "id": []}', "line 2: key is a list, not a string or a number"),
        (b'{"text": "t", "id": {}}', "line 2: key is an object, not a string or a number"),
        (b'{"text": "t", "id": "\\u0000"}', "line 2: key contains a NUL character"),
        (b'{"text": "t", "id": "\xff"}', "line 2: key is not valid UTF-8"),
        (
            b'{"text": "t", "id": "' + b"x" * 1025 + b'"}',
            "line 2: key has 1,025 bytes; at most 1,024 are allowed",
        ),
    ],
)
def test_messages_of_json_lines(row: bytes, message: str) -> None:
    rows = read("-", stdin=b'{"text": "good"}\n' + row + b'\n{"text": "good"}')
    assert [(at, found) for at, _, found in rows.problems] == [(1, message)]
    assert rows.texts == [b"good", None, b"good"]


def test_bad_bytes_elsewhere_leave_a_row_good() -> None:
    rows = read("-", stdin=b'{"text": "t", "id": 1, "other": "\xff"}\n{"text": "t", "other": "\\udfff"}')
    assert (rows.texts, rows.keys, rows.problems) == ([b"t", b"t"], ["1", None], [])


def test_a_rejected_row_keeps_its_key() -> None:
    assert read("-", stdin=b'{"id": 7, "text": null}').keys == ["7"]


def test_bad_rows_of_csv() -> None:
    put("a.csv", b'id,text\n1,\n2," "\n\n3,\xff\n4,a\0b\n5,"two\r\nlines"\n6,' + b"x" * 1001 + b"\n\xff,t\n")
    rows = read("a.csv")
    assert rows.keys == ["1", "2", "3", "4", "5", "6", None]
    assert [(code.value, message) for _, code, message in rows.problems] == [
        ("empty_text", "line 2: text is empty"),
        ("empty_text", "line 3: text is only white space"),
        ("invalid_utf8", "line 5: text is not valid UTF-8"),
        ("nul_character", "line 6: text contains a NUL character"),
        ("too_large", "line 9: text has 1,001 bytes; at most 1,000 are allowed"),
        ("bad_key", "line 10: key is not valid UTF-8"),
    ]
    assert rows.texts[4] == b"two\r\nlines"


@pytest.mark.parametrize("folded", [True, False])
def test_bad_rows_of_parquet(folded: bool) -> None:
    texts = pa.array([b"good", b"\xff", None, b"", b"a\0b", b"x" * 1001, b"good"]).view(pa.string())
    put_parquet("a.parquet", {"text": texts, "id": range(7)}, use_dictionary=folded, row_group_size=3)
    rows = read("a.parquet")
    assert rows.keys == list("0123456")
    assert [(code.value, message) for _, code, message in rows.problems] == [
        ("invalid_utf8", "row 2: text is not valid UTF-8"),
        ("missing_text", "row 3: text is null"),
        ("empty_text", "row 4: text is empty"),
        ("nul_character", "row 5: text contains a NUL character"),
        ("too_large", "row 6: text has 1,001 bytes; at most 1,000 are allowed"),
    ]


def test_several_files_are_named_in_messages() -> None:
    put("f/a.jsonl", '{"text": "t"}')
    put("f/b.csv", "text\n \n")
    assert read("f").problems == [(1, RejectCode.EMPTY_TEXT, "f/b.csv line 2: text is only white space")]


def test_columns_are_carried() -> None:
    columns = Columns(carry=("a", "b"))
    put("a.jsonl", '{"text": "t", "a": [1, {"x": null}], "b": "é"}\n{"text": "t", "a": "\\\\u0000"}\n')
    put("a.csv", "text,b,a\nt,é,1\n")
    put_parquet("a.parquet", {"text": ["t"], "a": pa.array([10**9]).cast(pa.timestamp("ns")), "b": [[1, None]]})
    assert [orjson.loads(row) for row in read("a.jsonl", "a.csv", "a.parquet", columns=columns).carried or []] == [
        {"a": [1, {"x": None}], "b": "é"},
        {"a": "\\u0000", "b": None},
        {"a": "1", "b": "é"},
        {"a": "1970-01-01T00:00:01", "b": [1, None]},
    ]


def test_carried_values_that_postgres_cannot_hold_reject_their_row() -> None:
    lines = b'{"text": "t", "a": "\\u0000"}\n{"text": "t", "a": "\xff"}\n{"text": "", "a": "\xff"}\n{"text": "t"}'
    rows = read("-", stdin=lines + b'\n{"text": "t", "a": {"x": ["\\\\\\u0000"]}}', columns=Columns(carry=("a",)))
    assert [(at, message) for at, _, message in rows.problems] == [
        (0, "line 1: a carried column contains a NUL character"),
        (1, "line 2: a carried column is not valid UTF-8"),
        (2, "line 3: text is empty"),
        (4, "line 5: a carried column contains a NUL character"),
    ]
    assert rows.carried == [b"{}", b"{}", b"{}", b'{"a":null}', b"{}"]


def test_large_integers_beside_invalid_bytes_are_carried() -> None:
    line = b'{"text": "t", "a": %d, "other": "\xff"}' % 2**70
    assert read("-", stdin=line, columns=Columns(carry=("a",))).carried == [b'{"a":%d}' % 2**70]


def test_carried_numbers_stay_as_they_are_written() -> None:
    rows = read("-", stdin=b'{"text": "t", "a": [1.50, {"b": 1e3}, -0, 1E+400]}', columns=Columns(carry=("a",)))
    assert rows.carried == [b'{"a":[1.50,{"b":1e3},-0,1E+400]}']


def test_a_carried_number_that_is_too_long_rejects_its_row() -> None:
    numbers = ("1e1000", "1e-1000", "9" * 1_001, "1e+00999")
    lines = "".join(f'{{"text": "t", "a": {number}}}\n' for number in numbers)
    rows = read("-", stdin=lines.encode(), columns=Columns(carry=("a",)))
    assert [(at, code, message) for at, code, message in rows.problems] == [
        (at, RejectCode.BAD_ROW, f"line {at + 1}: a carried column holds a number that is too long") for at in range(3)
    ]
