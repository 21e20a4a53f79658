"""A corpus comes back as it was written, each bad row is classified, each broken file says what is wrong."""

import csv
import gzip
import hashlib
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.jobs import RejectCode
from pipeline.sources import Columns, Corpus, Format, Rows
from pipeline.sources.open import whole_lines
from pipeline.sources.rows import BLOCK_BYTES, BLOCK_ROWS, LongLine

ITEM_BYTES = 1000
DEFAULT = Columns()
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(
    *sources: str,
    columns: Columns = DEFAULT,
    item_bytes: int = ITEM_BYTES,
    stdin: bytes = b"",
) -> Rows:
    """The whole corpus as one block."""
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
    with pytest.raises(SourceError) as caught:
        read(*sources, columns=columns, item_bytes=item_bytes)
    return str(caught.value)


def put(name: str, data: bytes | str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def put_parquet(name: str, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), name, **options)
    return name


def verdicts(rows: Rows) -> list[RejectCode | None]:
    found = {at: code for at, code, _ in rows.problems}
    return [found.get(at) for at in range(len(rows.keys))]


# What goes in comes out


def expected(text: object, key: object) -> tuple[str | None, RejectCode | None]:
    """The contract in other words than the code's: the key to keep, and the verdict."""
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
rounds = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
    check(read(name), [(text, key or None) for text, key in written])


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
        (pa.float64(), [1.0, 0.1, float("nan")], ["1.0", "0.1", None]),
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
        ("1e999", None),
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


# Bad rows


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
        (b'{"text": "t", "id": 1e999}', "line 2: key is not a finite number"),
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


# Carried columns


def test_columns_are_carried() -> None:
    columns = Columns(carry=("a", "b"))
    put("a.jsonl", '{"text": "t", "a": [1, {"x": null}], "b": "é"}\n{"text": "t", "a": "\\\\u0000"}\n')
    put("a.csv", "text,b,a\nt,é,1\n")
    put_parquet("a.parquet", {"text": ["t"], "a": pa.array([10**9]).cast(pa.timestamp("ns")), "b": [[1, None]]})
    assert [orjson.loads(row) for row in read("a.jsonl", "a.csv", "a.parquet", columns=columns).carried or []] == [
        {"a": [1, {"x": None}], "b": "é"},
        {"a": "\\u0000", "b": None},
        {"a": "1", "b": "é"},
        {"a": "1970-01-01 00:00:01.000000000", "b": [1, None]},
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


# Broken files, and wrong columns

GOOD = '{"text": "t"}\n'


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


TWO = Columns(text="body", key="id")


@pytest.mark.parametrize(
    ("line", "columns", "sentence"),
    [
        (
            '{"id": "1", "body": "t"}',
            Columns(),
            'no column "text"; columns are id, body. Use --text-column body.',
        ),
        (
            '{"a": "t", "b": "t", "c": 1}',
            Columns(),
            'no column "text"; columns are a, b, c. Name another with --text-column.',
        ),
        ("{}", Columns(), 'no column "text"; there is none at all. Name another with --text-column.'),
        (
            '{"text": "t"}',
            Columns(key="k", key_required=True),
            'no column "k"; columns are text. Name another with --key-column.',
        ),
        (
            '{"text": "t"}',
            Columns(carry=("c",)),
            'no column "c"; columns are text. Name another with --carry.',
        ),
    ],
)
def test_wrong_columns_of_json_lines(line: str, columns: Columns, sentence: str) -> None:
    assert refusal(put("a.jsonl", "\n" + f"{line}\n" * 3), columns=columns) == f"a.jsonl line 2: {sentence}"


def test_a_column_that_comes_late() -> None:
    late = '{"body": "t"}\n' * 999 + GOOD
    assert verdicts(read(put("a.jsonl", late))) == [RejectCode.MISSING_TEXT] * 999 + [None]
    sentence = 'a.jsonl line 1: no column "text"; columns are body. Use --text-column body.'
    assert refusal(put("a.jsonl", '{"body": "t"}\n' + late)) == sentence


def test_wrong_columns_of_csv() -> None:
    put("a.csv", "id,body\n1,t\n")
    sentence = 'a.csv line 1: no column "text"; columns are id, body. Use --text-column body.'
    assert refusal("a.csv") == sentence
    columns = Columns(text="body", key="k", key_required=True)
    sentence = 'a.csv line 1: no column "k"; columns are id, body. Name another with --key-column.'
    assert refusal("a.csv", columns=columns) == sentence


def test_many_and_odd_columns_are_shortened() -> None:
    put("a.csv", ",".join(["a\x07", "x" * 50, *(str(at) for at in range(28))]))
    listed = ", ".join(["a\ufffd", "x" * 40 + "…", *(str(at) for at in range(18)), "and 10 more"])
    sentence = f'a.csv line 1: no column "text"; columns are {listed}. Name another with --text-column.'
    assert refusal("a.csv") == sentence


@pytest.mark.parametrize(
    ("table", "columns", "sentence"),
    [
        (
            {"id": [1], "body": ["t"]},
            Columns(),
            'no column "text"; columns are id, body. Use --text-column body.',
        ),
        (
            {"text": [1]},
            Columns(),
            'column "text" is int64, not a string; name a string column with --text-column.',
        ),
        (
            {"text": [b"t"]},
            Columns(),
            'column "text" is binary, not a string; name a string column with --text-column.',
        ),
        (
            {"text": ["t"], "id": [[1]]},
            Columns(),
            'column "id" is list<element: int64>; a key is a string, a number or a boolean. '
            "Name another with --key-column.",
        ),
        (
            {"text": ["t"], "a": [b"x"]},
            Columns(carry=("a",)),
            'column "a" is binary, which can\'t be carried; leave it out of --carry.',
        ),
        (
            {"text": ["t"]},
            Columns(key="k", key_required=True),
            'no column "k"; columns are text. Name another with --key-column.',
        ),
    ],
)
def test_wrong_columns_of_parquet(table: dict[str, Any], columns: Columns, sentence: str) -> None:
    assert refusal(put_parquet("a.parquet", table), columns=columns) == f"a.parquet: {sentence}"


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


# Packed files and streams

PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files(ending: str) -> None:
    pack = PACKERS[ending]
    data = GOOD.encode() * 30_000
    put(f"a.jsonl.{ending}", pack(data) + pack(data))
    put(f"b.csv.{ending}", pack(b"text\n" + b"t\n" * 1000))
    assert len(read(f"a.jsonl.{ending}", f"b.csv.{ending}").texts) == 61_000


@pytest.mark.parametrize(("ending", "packing"), [("gz", "gzip"), ("zst", "zstd")])
def test_truncated_packed_files(ending: str, packing: str) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % at).hexdigest().encode() for at in range(20_000))
    packed = PACKERS[ending](lines)
    name = f"a.jsonl.{ending}"
    for size in (1, 10, len(packed) // 2, len(packed) - 1):
        sentence = refusal(put(name, packed[:size]))
        assert sentence.startswith(f"{name}: the {packing} data ends early after line ")
        assert sentence.endswith("; the file is truncated.")
    put(name, packed + packed[:20])
    assert refusal(name) == f"{name}: the {packing} data ends early after line 20,000; the file is truncated."


def _planned(name: str) -> int:
    corpus = Corpus([name], Columns(), ITEM_BYTES)
    return sum(len(places.sizes) for places in corpus.places(corpus.files[0]))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("packing", ["zstd", "gzip"])
def test_a_bomb_is_refused(packing: str, planned: bool) -> None:
    bomb = GOOD.encode() + b" " * 300 * MIB
    name = "a.jsonl.zst" if packing == "zstd" else "a.jsonl.gz"
    put(name, zstandard.compress(bomb) if packing == "zstd" else gzip.compress(bomb))
    with pytest.raises(SourceError) as refused:
        _planned(name) if planned else read(name)
    # The best that gzip does is 1,032-fold.
    assert str(refused.value).endswith(
        f"{name}: the {packing} data grows over 1,000-fold after line 1; unpack it first if that is right."
    )


def test_a_zstd_window_past_what_is_held_is_refused() -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    put("a.jsonl.zst", packer.compress(GOOD.encode()) + packer.flush())
    assert refusal("a.jsonl.zst") == (
        "a.jsonl.zst: the zstd data needs too much memory after line 0; pack it again without --long."
    )


@pytest.mark.parametrize("planned", [False, True])
def test_a_parquet_bomb_is_refused_by_its_metadata(planned: bool) -> None:
    text = "a text of a hundred letters that stands in the file a great many times, and in the page only once. "
    table = pa.table({"text": pa.array([text * 10] * 400_000)})
    pq.write_table(table, "a.parquet", compression="zstd", use_dictionary=False, data_page_size=512 * MIB)
    with pytest.raises(SourceError, match=r"a\.parquet: the data grows over 1,000-fold; write it again with less"):
        _planned("a.parquet") if planned else read("a.parquet")


def test_schemas_that_differ_are_told_by_the_file() -> None:
    Path("f").mkdir()
    put_parquet("f/a.parquet", {"text": ["t"], "n": [1]})
    put_parquet("f/b.parquet", {"body": ["t"], "n": [1]})
    with pytest.raises(SourceError, match=r"f/b\.parquet: no column \"text\"; columns are body, n"):
        read("f")


def test_a_byte_order_mark_is_no_text() -> None:
    assert read(put("a.jsonl", "\ufeff" + GOOD), put("a.csv", "\ufefftext\nt\n")).texts == [b"t", b"t"]
    assert read("-", stdin=("\ufeff" + GOOD).encode()).texts == [b"t"]


@pytest.mark.parametrize("data", ["text,id\r\nt,1\r\nu,2", "text,id\rt,1\ru,2\r", "text,id\nt,1\n\nu,2\n"])
def test_line_ends_of_csv(data: str) -> None:
    rows = read(put("a.csv", data))
    assert (rows.texts, rows.keys) == ([b"t", b"u"], ["1", "2"])


def test_the_stream_is_hashed() -> None:
    data = GOOD.encode() * 100_000
    corpus = Corpus(["-"], Columns(), ITEM_BYTES, io.BytesIO(data))
    assert (corpus.fingerprint(), corpus.stream_sha256) == (None, None)
    assert sum(len(rows.texts) for rows in corpus.blocks()) == 100_000
    assert corpus.stream_sha256 == hashlib.sha256(data).hexdigest()


# Folders, fingerprints, changes


def test_a_folder_is_read_in_order_of_names() -> None:
    for name in ("f/b.jsonl", "f/a/z.NDJSON", "f/c.csv", "f/.hidden.jsonl", "f/.git/a.jsonl", "f/readme.md"):
        put(name, "text\nt" if name.endswith("csv") else GOOD)
    corpus = Corpus(["f"], Columns(), ITEM_BYTES)
    assert [(file.name, file.format) for file in corpus.files] == [
        ("f/a/z.NDJSON", Format.JSONL),
        ("f/b.jsonl", Format.JSONL),
        ("f/c.csv", Format.CSV),
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


# Bounds


@given(st.lists(st.one_of(st.just(b"\n"), st.binary(max_size=6)), max_size=30).map(b"".join), st.integers(1, 9))
@settings(deadline=None)
def test_lines_are_cut_alike_at_any_block_size(data: bytes, size: int) -> None:
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    found: list[tuple[int, bytes | int]] = []
    for run in whole_lines(blocks, "a", 9):
        if isinstance(run, LongLine):
            found.append((run.number, run.size_bytes))
        else:
            found += enumerate(run[1].split(b"\n"), run[0])
    lines = data.split(b"\n")
    wanted = [(at, line if len(line) <= 9 else len(line)) for at, line in enumerate(lines, 1)]
    assert found == (wanted if lines[-1] else wanted[:-1])


def test_a_long_line_is_skipped_without_being_held() -> None:
    with open("a.jsonl", "wb") as file:
        file.write(GOOD.encode() + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * MIB)
        file.write(b'"}\n' + GOOD.encode())
    tracemalloc.start()
    rows = read("a.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * MIB
    assert rows.texts == [b"t", None, b"t"]
    assert rows.problems == [
        (1, RejectCode.TOO_LARGE, "line 2: the line has 104,857,612 bytes; at most 1,054,576 are read")
    ]


def test_blocks_are_bounded() -> None:
    put("a.jsonl", b'{"text": "a"}\n' * 20_000 + (b'{"text": "%s"}\n' % (b"x" * MIB)) * 20)
    put("a.csv", b"text\n" + (b"x" * MIB + b"\n") * 20)
    put_parquet("a.parquet", {"text": ["x" * MIB + str(at) for at in range(20)]})
    corpus = Corpus(["a.jsonl", "a.csv", "a.parquet"], Columns(), 2 * MIB)
    sizes = [(len(rows.texts), sum(len(text or b"") for text in rows.texts)) for rows in corpus.blocks()]
    assert sum(rows for rows, _ in sizes) == 20_060
    assert max(rows for rows, _ in sizes) <= BLOCK_ROWS
    assert max(size for _, size in sizes) <= BLOCK_BYTES + 2 * MIB


def test_a_dictionary_of_long_texts_does_not_unfold_at_once() -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 1000), pa.array(["x" * MIB, "y" * MIB]))
    pq.write_table(pa.table({"text": texts}), "a.parquet", store_schema=False)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    count = 0
    for rows in Corpus(["a.parquet"], Columns(), 2 * MIB).blocks():
        assert sum(len(text or b"") for text in rows.texts) <= BLOCK_BYTES + MIB
        assert pool.bytes_allocated() - before < 300 * MIB
        count += len(rows.texts)
    assert count == 2000
