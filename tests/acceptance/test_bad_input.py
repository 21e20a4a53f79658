"""Bad input through the command itself: a broken file is refused in one sentence, a bad row costs only itself, and no
amount of either takes more memory."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.acceptance.fleet import Fleet

MIB = 1024 * 1024
#: Empty rows copied to Postgres, where ten million would take a few minutes. Workers read ten million by reference.
BY_VALUE_ROWS = int(os.environ.get("EMPTY_ROWS", 1_000_000))
BY_REFERENCE_ROWS = 10_000_000
#: Memory limit of the command, which takes 150 MB when idle, and several copies of a 50 MB value in Parquet.
MOST_BYTES = 640 * MIB

LINE = b'{"id": "good", "text": "a good text"}\n'
LINES = b"".join(b'{"id": %d, "text": "text %d"}\n' % (at, at) for at in range(1_000))


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def _parquet_bomb() -> bytes:
    text = "said once in the page, and a great many times in the column that it unpacks to; " * 12
    return _parquet({"text": [text] * 400_000}, compression="zstd", use_dictionary=False, data_page_size=512 * MIB)


def _broken() -> dict[str, tuple[bytes, str]]:
    """Return broken files by name, each with its error message."""
    parquet = _parquet({"text": ["a good text"] * 100})
    footer = ": the Parquet footer can't be read; the file is truncated or damaged."
    bomb = LINE + b" " * 300 * MIB
    grows = "grows over 1,000-fold after line 1; unpack it first if that is right."
    return {
        "cut.jsonl": (LINES[:-9], " line 1,000: not valid JSON (unterminated string starting at column 21)."),
        "cut.jsonl.gz": (
            gzip.compress(LINE * 2)[:-4],
            ": the gzip data ends early after line 2; the file is truncated.",
        ),
        "cut.csv.zst": (
            zstandard.compress(b"text\nt\n")[:-4],
            ": the zstd data ends early after line 0; the file is truncated.",
        ),
        "cut.parquet": (parquet[:-20], footer),
        "json.parquet": (LINES, ": not a Parquet file."),
        "parquet.jsonl": (parquet, ": not text but Parquet; give it as a file whose name ends in .parquet."),
        "packed.csv": (
            gzip.compress(b"text\nt\n"),
            ": not text but gzip data; unpack it, or name it with .gz at the end.",
        ),
        "plain.jsonl.gz": (LINES, ": not gzip data, as its name says; name it for what it is."),
        "wide.jsonl": ((LINE * 9).decode().encode("utf-16"), ": the file is UTF-16; save it as UTF-8."),
        "array.jsonl": (b"[" + LINE + b"]", ": a JSON array, not JSON lines; write each object on a line of its own."),
        "semicolons.csv": (
            b"id;text\n1;t\n",
            " line 1: columns are divided by semicolons; .csv is read with commas, and .tsv with tabs, "
            "unless it is set.",
        ),
        "list.parquet": (
            _parquet({"text": [["a"]]}),
            ': column "text" is list<element: string>, not a string; name a string column.',
        ),
        "bomb.jsonl.gz": (gzip.compress(bomb), f": the gzip data {grows}"),
        "bomb.jsonl.zst": (zstandard.compress(bomb), f": the zstd data {grows}"),
        "bomb.parquet": (_parquet_bomb(), ": the data grows over 1,000-fold; write it again with less compression."),
    }


#: Option that the file doesn't fit, at the start of its error message.
_OPTIONS = {"semicolons.csv": "--delimiter: ", "list.parquet": "--text-column: "}


def test_a_broken_file_is_refused_in_one_sentence(fleet: Fleet, tmp_path: Path) -> None:
    broken = _broken()
    for name, (data, _) in broken.items():
        assert len(data) < MIB
        (tmp_path / name).write_bytes(data)
    # By value and by reference, all of a compressed file is read, and the metadata of Parquet.
    tried = [
        *((name, "--by-value") for name in broken),
        *((name, "--by-reference") for name in broken if name.startswith("bomb")),
    ]
    submits = [["submit", "--model", "static", str(tmp_path / name), way] for name, way in tried]
    said, peak = _measured(fleet, "tests.support.commands", json.dumps(submits))
    assert peak < MOST_BYTES
    for (name, _), result in zip(tried, json.loads(said), strict=True):
        option = _OPTIONS.get(name, "")
        assert result == [2, f"error {option}{tmp_path / name}{broken[name][1]}\n"]
    assert fleet.scalar("select count(*) from vectormill.jobs") == 0
    assert fleet.scalar("select count(*) from vectormill.items") == 0


def _submit(fleet: Fleet, *arguments: str) -> int:
    """Run `vectormill submit`, which may warn only that there are no keys. Return its peak memory in bytes."""
    said, peak = _measured(fleet, "pipeline.cli", "submit", "--model", "static", *arguments)
    assert [line for line in said.splitlines() if 'no column "id"' not in line] == []
    return peak


def _measured(fleet: Fleet, *command: str) -> tuple[str, int]:
    """Run a module, which must succeed. Return its standard error and its peak memory in bytes."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.peak", sys.executable, "-m", *command],
        env={**os.environ, **fleet.environment},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr, int(ended.stdout)


def _bad_rows(folder: Path) -> list[tuple[str | None, str]]:
    """Write files of good and bad rows. Return key and code of each reject, in order of the files' names and rows."""
    folder.mkdir()
    good, long = LINE, b"x" * 50 * MIB
    (folder / "a-long.csv").write_bytes(b"id,text\n1,good\n2," + long + b"\n3,good\n")
    (folder / "b-long.jsonl").write_bytes(good + b'{"id": 2, "text": "' + long + b'"}\n' + good)
    (folder / "c-long.parquet").write_bytes(_parquet({"id": [1, 2, 3], "text": ["good", long.decode(), "good"]}))
    (folder / "d-nul.jsonl").write_bytes(
        good + b'{"id": "nul", "text": "a\\u0000b"}\n{"id": "a\\u0000", "text": "nul key"}\n'
    )
    (folder / "e-nul.tsv").write_bytes(b"id\ttext\n1\tgood\n2\ta\0b\n3\t\n4\t   \n")
    (folder / "f-surrogates.jsonl").write_bytes(
        b'{"id": 1, "text": "\\ud83d alone"}\n{"id": "\\udfff", "text": "t"}\n'
        b'{"id": 3, "text": "\\ud83d\\ude42 both"}\n'
    )
    latin, wide = "naïve".encode("latin-1"), "naïve".encode("utf-16-be")
    (folder / "g-mixed.csv").write_bytes(b"id,text\n1,na\xc3\xafve\n2," + latin + b"\n3," + wide + b"\n4,good\n")
    nested: list[Any] = [["a"], {"a": 1}, 5, 1.5, True, None, "", [[]], "good"]
    (folder / "h-nested.jsonl").write_text(
        "".join(json.dumps({"id": at, "text": text}) + "\n" for at, text in enumerate(nested)) + '{"id": [1]}\n{}\n'
    )
    texts = pa.array(["good", None, "", "good"]).dictionary_encode()
    columns = {"id": [1, 2, 3, 4], "text": texts, "more": [[{"deep": [1]}]] * 4}
    (folder / "i-nested.parquet").write_bytes(_parquet(columns))
    return [
        (None, "too_large"),
        (None, "too_large"),
        ("2", "too_large"),
        ("nul", "nul_character"),
        (None, "bad_key"),
        *[("2", "nul_character"), ("3", "empty_text"), ("4", "empty_text")],
        ("1", "invalid_utf8"),
        (None, "bad_key"),
        ("2", "invalid_utf8"),
        ("3", "invalid_utf8"),
        *[(str(at), "not_a_string") for at in range(5)],
        ("5", "missing_text"),
        ("6", "empty_text"),
        ("7", "not_a_string"),
        (None, "missing_text"),
        (None, "missing_text"),
        *[("2", "missing_text"), ("3", "empty_text")],
    ]


def test_a_bad_row_costs_only_itself(fleet: Fleet, tmp_path: Path) -> None:
    expected = _bad_rows(tmp_path / "corpus")
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    found = []
    for way in ("--by-value", "--by-reference"):
        assert _submit(fleet, str(tmp_path / "corpus"), way, "--name", way, "--max-rejects", "100%") < MOST_BYTES
        job = _job(fleet, way)
        ended = fleet.await_end(job)
        assert (ended["state"], ended["items"]["total"]) == ("completed", 38)
        _check_receipt(fleet, job, rejected=len(expected))
        found.append(json.loads(fleet.cli("rejects", str(job), "--json").stdout))
    assert [(reject["key"], reject["code"]) for reject in found[0]] == expected
    assert [(reject["index"], reject["key"], reject["code"]) for reject in found[1]] == [
        (reject["index"], reject["key"], reject["code"]) for reject in found[0]
    ]


def _job(fleet: Fleet, name: str) -> UUID:
    found: UUID = fleet.scalar("select id from vectormill.jobs where name = :name", name=name)
    return found


def _check_receipt(fleet: Fleet, job: UUID, *, rejected: int) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads(fleet.cli("receipt", str(job), "--verify", "--json").stdout)
    assert (receipt["balanced"], receipt["verified"]) == (True, True)
    assert receipt["items"]["rejected"] == rejected
    return receipt


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("csv", marks=pytest.mark.nightly)])
def test_empty_rows_fail_their_job_and_cost_no_memory(fleet: Fleet, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"empty.{kind}"
    head, row = (b"id,text\n", b",\n") if kind == "csv" else (b"", b'{"text": ""}\n')
    with path.open("wb") as file:
        file.write(head)
        for _ in range(0, BY_VALUE_ROWS, 10_000):
            file.write(row * 10_000)
    fleet.environment |= {"VECTORMILL_CHUNK_ITEMS": "8192", "VECTORMILL_LEASE_SECONDS": "30"}
    fleet.start_dispatcher()
    assert _submit(fleet, str(path), "--by-value", "--name", "empty") < MOST_BYTES
    ended = fleet.await_end(_job(fleet, "empty"))
    assert (ended["state"], ended["reason"]) == ("failed", "all_rejected")
    _check_receipt(fleet, _job(fleet, "empty"), rejected=BY_VALUE_ROWS)


@pytest.mark.nightly
def test_ten_million_empty_rows_by_reference_fail_their_job_early(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    path.write_bytes(_parquet({"text": pa.array([""]).take(pa.array([0] * BY_REFERENCE_ROWS, pa.int8()))}))
    assert path.stat().st_size < MIB
    fleet.environment |= {"VECTORMILL_CHUNK_ITEMS": "50000", "VECTORMILL_LEASE_SECONDS": "30"}
    fleet.start_dispatcher()
    fleet.start_worker(replicas=2)
    assert _submit(fleet, str(path), "--by-reference", "--name", "empty") < MOST_BYTES
    ended = fleet.await_end(_job(fleet, "empty"))
    # The job fails once more than a tenth is rejected, and never reads the rest.
    assert (ended["state"], ended["reason"]) == ("failed", "too_many_rejects")
    items = ended["items"]
    assert BY_REFERENCE_ROWS // 10 < items["rejected"] < BY_REFERENCE_ROWS // 2
    assert items["rejected"] + items["cancelled"] == BY_REFERENCE_ROWS
    _check_receipt(fleet, _job(fleet, "empty"), rejected=items["rejected"])
