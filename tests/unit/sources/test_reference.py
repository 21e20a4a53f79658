"""Reading by reference: a file read chunk by chunk, as workers do, gives the same rows as read whole."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.chunks import Extent, RejectCode
from pipeline.core.errors import SourceChanged, SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus, Rows
from pipeline.sources.by_reference import read_extent
from pipeline.sources.places import ParquetPlaces

ITEM_BYTES = 200
COLUMNS = Columns(carry=("n",))
Row = tuple[str | None, str | None, str]

#: Texts that are hard for the readers: quotes, line ends of all kinds, letters of several bytes, empty ones.
TEXTS = st.text(st.sampled_from("ab\"',;\n\r é数🙂\u2028\x85"), max_size=12) | st.just("x" * 300)


@pytest.fixture(autouse=True, params=[7, 64, 1 << 20])
def _small_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks of several sizes, the smallest of which cut every line somewhere."""
    monkeypatch.setattr("pipeline.sources.decode.READ_BYTES", request.param)


def whole(path: Path, columns: Columns = COLUMNS) -> list[Row]:
    return list(_flat(Corpus([str(path)], columns, ITEM_BYTES).blocks()))


def by_chunks(path: Path, per_chunk: int, columns: Columns = COLUMNS) -> list[Row]:
    corpus = Corpus([str(path)], columns, ITEM_BYTES)
    return [
        row
        for extent, rows in extents(corpus, per_chunk)
        for row in _flat(read_extent(extent, rows, columns, ITEM_BYTES))
    ]


def extents(corpus: Corpus, per_chunk: int) -> Iterator[tuple[Extent, int]]:
    (file,) = corpus.files
    spots = [(places, at) for places in corpus.places(file) for at in range(len(places.sizes))]
    for start in range(0, len(spots), per_chunk):
        (first, at), (last, last_at) = spots[start], spots[min(start + per_chunk, len(spots)) - 1]
        yield first.extent(file, at, last, last_at), min(per_chunk, len(spots) - start)


def _flat(blocks: Iterator[Rows]) -> Iterator[Row]:
    for rows in blocks:
        problems = {at: f"{code}: {message.split(' ', 1)[-1]}" for at, code, message in rows.problems}
        for at, (key, text) in enumerate(zip(rows.keys, rows.texts, strict=True)):
            carried = rows.carried[at].decode() if rows.carried and at not in problems else ""
            number = next((m.split(":")[0].split()[-1] for a, _, m in rows.problems if a == at), "")
            yield (
                key,
                None if text is None else text.decode(),
                problems.get(at, "").rsplit(":", 1)[-1] + number + carried,
            )


@given(
    st.lists(TEXTS, max_size=12), st.integers(1, 5), st.booleans(), st.sampled_from(["\n", "\r\n", "\n \n", "\n\t\n\n"])
)
@settings(max_examples=60)
def test_json_lines(tmp_path_factory: pytest.TempPathFactory, texts: list[str], per: int, mark: bool, end: str) -> None:
    lines = [json.dumps({"id": n, "text": text, "n": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(lines).encode("utf-8", "surrogatepass"))
    assert by_chunks(path, per) == whole(path)


@given(
    st.lists(TEXTS, min_size=1, max_size=12), st.integers(1, 5), st.booleans(), st.sampled_from(["\n", "\r\n", "\r"])
)
@settings(max_examples=60)
def test_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str], per: int, mark: bool, end: str) -> None:
    def field(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if set(text) & set('",\n\r') else text

    rows = ["id,text,n", *(f"k{n},{field(text)},{n}" for n, text in enumerate(texts))]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(rows).encode())
    assert by_chunks(path, per) == whole(path)


@given(
    st.lists(st.text(st.sampled_from("ab\"',;\t r é数🙂"), max_size=8), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "sep=|", '"sep=|"']),
)
@settings(deadline=None, max_examples=60)
def test_csv_without_quotes(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], per: int, mark: bool, end: str, named: str
) -> None:
    first = [named] if named else []
    rows = [*first, "id|text|n", *(f"k{n}|{text}|{n}" for n, text in enumerate(texts))]
    path = tmp_path_factory.mktemp("csv") / "a.tsv"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(rows).encode())
    columns = Columns(carry=("n",), delimiter=None if named else "|")
    assert by_chunks(path, per, columns) == whole(path, columns)
    assert [key for key, *_ in whole(path, columns)] == [f"k{n}" for n in range(len(texts))]


@given(st.lists(TEXTS | st.none(), min_size=1, max_size=30), st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=40)
def test_parquet(tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], per: int, group: int) -> None:
    table = pa.table(
        {"id": list(range(len(texts))), "text": pa.array(texts, pa.string()), "n": list(range(len(texts)))}
    )
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(table, path, row_group_size=group)
    assert by_chunks(path, per) == whole(path)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_packed_text(tmp_path: Path, pack: object) -> None:
    lines = "".join(json.dumps({"id": n, "text": f"text {n}", "n": n}) + "\n" for n in range(50))
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.write_bytes(pack(lines.encode()))  # type: ignore[operator]
    assert by_chunks(path, 7) == whole(path)
    assert len(whole(path)) == 50


def test_a_bad_line_is_rejected_by_its_worker(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"id": n, "text": "x", "n": 0}) for n in range(1_200)]
    path.write_text("\n".join([*good, "{broken", "[1]", good[0]]))
    corpus = Corpus([str(path)], COLUMNS, ITEM_BYTES)
    problems = [
        problem
        for extent, rows in extents(corpus, 500)
        for block in read_extent(extent, rows, COLUMNS, ITEM_BYTES)
        for problem in block.problems
    ]
    assert [(code, message.partition(" line ")[2]) for _, code, message in problems] == [
        (RejectCode.BAD_ROW, "1,201: not valid JSON (expecting property name enclosed in double quotes at column 2)"),
        (RejectCode.BAD_ROW, "1,202: not a JSON object; write one object per line"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n', 'no column "text"'),
        ("a.jsonl", b'[{"text": "x"}]', "a JSON array"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2: 3 fields where the header has 2"),
        ("a.csv", b"id,body\n1,a\n", 'no column "text"'),
        ("a.parquet", b"PAR1nothing", "truncated or damaged"),
    ],
)
def test_what_planning_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = Corpus([str(tmp_path / name)], Columns(), ITEM_BYTES)
    with pytest.raises(SourceError, match=message):
        list(corpus.places(corpus.files[0]))


def test_a_packed_text_too_long_for_references_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.places.MOST_UNPACKED_BYTES", 1_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x", "n": 1}\n' * 100))
    corpus = Corpus([str(path)], COLUMNS, ITEM_BYTES)
    with pytest.raises(SourceError, match="unpacks to more than 1,000 bytes"):
        list(corpus.places(corpus.files[0]))


@pytest.mark.parametrize("change", ["grown", "replaced", "gone"])
def test_a_changed_file_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "n": 1}\n' * 10)
    corpus = Corpus([str(path)], COLUMNS, ITEM_BYTES)
    ((extent, rows),) = extents(corpus, 10)
    if change == "gone":
        path.unlink()
    else:
        (tmp_path / "new").write_text('{"text": "y", "n": 1}\n' * (11 if change == "grown" else 10))
        (tmp_path / "new").replace(path)
    with pytest.raises(SourceChanged, match="submit it again"):
        list(read_extent(extent, rows, COLUMNS, ITEM_BYTES))


def test_tiny_row_groups_are_planned_together(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 1_000}), path, row_group_size=3)
    corpus = Corpus([str(path)], Columns(), ITEM_BYTES)
    (places,) = corpus.places(corpus.files[0])
    assert isinstance(places, ParquetPlaces)
    assert np.array_equal(places.row_groups, np.arange(1_000) // 3)
    assert np.array_equal(places.offsets, np.arange(1_000) % 3)
