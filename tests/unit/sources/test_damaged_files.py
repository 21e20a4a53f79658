"""Damaged files: each is read, or refused in one sentence, alike by value and by reference."""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus, Rows
from pipeline.sources.by_reference import read_extent
from pipeline.sources.parquet_guard import Stored, pages
from tests.unit.sources.test_reference import extents

ITEM_BYTES = 60
COLUMNS = Columns(carry=("n",), quote='"')
TEXTS = ["plain", "é数🙂", "", "two\nlines", "a\0b", ' "quoted", ', "x" * 70, "\u2028\x85", " \t", "tail"] * 2

#: Key, text, problem after the number of its line, carried columns.
Row = tuple[str | None, bytes | None, str, bytes]


def _json_lines() -> list[bytes]:
    rows = ({"id": n, "text": text, "n": {"deep": [n, {"er": None}]}} for n, text in enumerate(TEXTS))
    return [json.dumps(row, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, row in enumerate(rows)]


def _csv_lines(delimiter: str) -> list[bytes]:
    found = []
    for row in [["id", "text", "n"], *([f"k{n}", text, f"{n}"] for n, text in enumerate(TEXTS))]:
        line = io.StringIO(newline="")
        csv.writer(line, delimiter=delimiter).writerow(row)
        found.append(line.getvalue().encode())
    return found


def _parquet(**options: object) -> bytes:
    table = pa.table(
        {
            "id": list(range(len(TEXTS))),
            "text": TEXTS,
            "n": [[{"deep": n}] for n in range(len(TEXTS))],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=7, write_page_checksum=True, **options)
    return file.getvalue()


#: Lines of the text formats, kept apart so that the end of each row is known.
LINES = {"jsonl": _json_lines(), "csv": _csv_lines(","), "tsv": _csv_lines("\t")}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
FILES = {
    **{f"a.{kind}{end}": pack(b"".join(lines)) for kind, lines in LINES.items() for end, pack in PACKINGS.items()},
    "a.parquet": _parquet(),
}
#: More ways to write Parquet, without file names of their own.
PARQUETS = [
    FILES["a.parquet"],
    _parquet(use_dictionary=False, compression="none"),
    _parquet(compression="zstd", data_page_version="2.0"),
    _parquet(store_schema=False, compression="gzip", write_statistics=False),
]


@dataclass(frozen=True, slots=True)
class Damage:
    """Replacement of some bytes by others."""

    #: Offset of the first byte, which wraps around at the file's end.
    at: int
    #: Number of bytes removed. None removes all that follow.
    gone: int | None
    put: bytes

    def start(self, data: bytes) -> int:
        """Return the offset at which the damage begins."""
        return self.at % (len(data) + 1)

    def of(self, data: bytes) -> bytes:
        """Return the damaged file."""
        start = self.start(data)
        rest = b"" if self.gone is None else data[start + self.gone :]
        return data[:start] + self.put + rest


NASTY = st.sampled_from(
    [
        *(b"", b"\0", b"\n", b"\r", b'"', b",", b"\t", b"{", b"[", b"}\n{", b"\n\n", b"\xff" * 4, b"PAR1", b"\\ud800"),
        *("é".encode("latin-1"), "é,\n".encode("utf-16"), "\ufeff".encode(), b"\xed\xa0\x80", b"NaN", b"9" * 400),
    ]
)
SPLICES = st.builds(
    lambda data, at: data[at % len(data) :], st.sampled_from(list(FILES.values())), st.integers(0, 4000)
)
DAMAGES = st.builds(
    Damage,
    st.integers(0, 6000),
    st.one_of(st.integers(0, 9), st.none()),
    st.one_of(NASTY, st.binary(max_size=8), SPLICES),
)
rounds = settings(max_examples=100, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def by_value(path: Path) -> list[Row] | str:
    """Return the file's rows, or the reason of its refusal."""
    return _outcome(path, lambda: _rows(Corpus([str(path)], COLUMNS, ITEM_BYTES).blocks()))


def by_reference(path: Path) -> list[Row] | str:
    """Return the same as `by_value`, as planning and workers see it."""

    def read() -> Iterator[Row]:
        planned = list(extents(Corpus([str(path)], COLUMNS, ITEM_BYTES), 3))
        for extent, count in planned:
            yield from _rows(read_extent(extent, count, COLUMNS, ITEM_BYTES))

    return _outcome(path, read)


def _outcome(path: Path, read: Callable[[], Iterator[Row]]) -> list[Row] | str:
    try:
        return list(read())
    except SourceError as error:
        said = str(error)
    assert path.name in said
    assert said.isprintable()
    assert said[-1] in ".?"
    assert len(said) < 1_200
    assert not re.search(r"Error|Exception|NoneType|Traceback|Arrow|[Tt]hrift|object at|b'|codec", said), said
    return said


def _rows(blocks: Iterator[Rows]) -> Iterator[Row]:
    for rows in blocks:
        assert len(rows.keys) == len(rows.texts)
        assert [at for at, text in enumerate(rows.texts) if text is None] == [at for at, *_ in rows.problems]
        assert all(isinstance(code, RejectCode) and message.isprintable() for _, code, message in rows.problems)
        faults = {at: re.sub(r"^.*?(line|row) ", "", message) for at, _, message in rows.problems}
        for at, (key, text) in enumerate(zip(rows.keys, rows.texts, strict=True)):
            yield key, text, faults.get(at, ""), rows.carried[at] if rows.carried else b""


def check(path: Path, data: bytes) -> list[Row] | str:
    """Read a file both by value and by reference, compare, and return the outcome by value."""
    path.write_bytes(data)
    value, reference = by_value(path), by_reference(path)
    if isinstance(value, list):
        assert reference == value
    elif isinstance(reference, list):
        # Only the worker finds a line that is no JSON object.
        assert ".jsonl" in path.name
        assert any("not valid JSON" in fault or "not a JSON object" in fault for _, _, fault, _ in reference)
    return value


def damaged(data: bytes, damages: list[Damage]) -> bytes:
    """Return a file's bytes after one damage and the next."""
    for damage in damages:
        data = damage.of(data)
    return data


@pytest.mark.parametrize("name", FILES)
@rounds
@given(damages=st.lists(DAMAGES, min_size=1, max_size=2))
def test_a_damaged_file_is_read_or_refused(name: str, damages: list[Damage], folder: Path) -> None:
    check(folder / name, damaged(FILES[name], damages))


@pytest.mark.parametrize("at", range(len(PARQUETS)))
@rounds
@given(damages=st.lists(DAMAGES, min_size=1, max_size=2))
def test_damaged_parquet_is_read_or_refused(at: int, damages: list[Damage], folder: Path) -> None:
    check(folder / "a.parquet", damaged(PARQUETS[at], damages))


@pytest.mark.parametrize("label", FILES)
@pytest.mark.parametrize("name", FILES)
def test_a_file_with_another_ones_ending(name: str, label: str, folder: Path) -> None:
    found = check(folder / label, FILES[name])
    if name == label:
        assert len(found) == len(TEXTS)
    elif {name[:5], label[:5]} != {"a.csv", "a.tsv"}:
        assert isinstance(found, str)


@pytest.mark.parametrize("kind", LINES)
@rounds
@given(damage=DAMAGES)
def test_rows_before_the_damage_are_the_originals(kind: str, damage: Damage, folder: Path) -> None:
    data = FILES[f"a.{kind}"]
    clean, found = check(folder / f"a.{kind}", data), check(folder / f"a.{kind}", damage.of(data))
    ends = [sum(map(len, LINES[kind][: at + 1])) for at in range(len(LINES[kind]))]
    whole = sum(end <= damage.start(data) for end in ends) - (kind != "jsonl")
    if isinstance(found, list) and whole > 0:
        assert found[:whole] == clean[:whole]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".gz", ".zst"))])
@rounds
@given(at=st.integers(0, 6000), gone=st.one_of(st.integers(0, 9), st.none()), put=NASTY | st.binary(max_size=8))
def test_what_is_packed_is_whole_or_refused(name: str, at: int, gone: int | None, put: bytes, folder: Path) -> None:
    damaged = Damage(at, gone, put).of(FILES[name])
    found = check(folder / name, damaged)
    if isinstance(found, list):
        assert found == check(folder / name, FILES[name])


def test_damaged_statistics_of_parquet_do_not_end_the_process(folder: Path) -> None:
    data = PARQUETS[0]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for at in range(footer, footer + 100):
        check(folder / "a.parquet", Damage(at, 1, bytes([(data[at] + 1) % 256])).of(data))


def test_rows_that_a_damaged_parquet_file_lacks_are_missed(folder: Path) -> None:
    data = _parquet(write_statistics=False)
    # The first column of the first row group claims -44 values instead of seven, as zigzag varints.
    at = data.index(b"\x02id\x15\x02\x16\x0e") + len(b"\x02id\x15\x02\x16")
    found = check(folder / "a.parquet", Damage(at, 1, b"\x57").of(data))
    assert found == f"{folder}/a.parquet row 1: 7 rows that the footer names aren't there; make the file again."


def test_a_column_that_row_groups_call_by_another_name_is_read(folder: Path) -> None:
    data = PARQUETS[0].replace(b"\x19\x18\x04text", b"\x19\x18\x04tent")
    assert data != PARQUETS[0]
    assert check(folder / "a.parquet", data) == check(folder / "a.parquet", PARQUETS[0])


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_parquet_of_any_encoding_is_read(encoding: str, folder: Path) -> None:
    found = check(folder / "a.parquet", _parquet(use_dictionary=False, column_encoding={"text": encoding}))
    assert found == check(folder / "a.parquet", FILES["a.parquet"])


def test_a_page_that_claims_more_bytes_than_there_are_is_refused(folder: Path) -> None:
    data = PARQUETS[1]
    # The first page's header begins the file: its type, and its size uncompressed and compressed, 62 bytes in zigzag.
    assert data[4:10] == b"\x15\x00\x15\x7c\x15\x7c"
    for at in (7, 9):
        found = check(folder / "a.parquet", Damage(at, 1, b"\xf8\xff\xff\xff\x07").of(data))
        assert found == f"{folder}/a.parquet: the data is damaged; make the file again."


#: String of statistics whose declared length is beyond any offset in a file.
ENDLESS = b"\x18" + b"\xff" * 9 + b"\x01"


def test_rows_before_a_damaged_page_are_read(folder: Path) -> None:
    """A chunk is judged by the pages that are read for it, so that a large row group isn't read whole."""
    path, count = folder / "pages.parquet", 20_000
    table = pa.table({"text": [f"text {n}" for n in range(count)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, data_page_size=1, write_batch_size=1_000)
    data, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0)
    stored = Stored(column.data_page_offset, column.total_compressed_size, count, rows=count, repeated=False)
    sizes = [page.packed_bytes for page in pages(io.BytesIO(data), stored)]
    assert len(sizes) == count // 1_000
    planned = list(extents(Corpus([str(path)], Columns(), ITEM_BYTES), 2_000))
    first_text = data.rindex(f"text {count - 1_000}".encode())
    before = path.stat()
    path.write_bytes(Damage(first_text - 20, 16, (ENDLESS * 2)[:16]).of(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for extent, rows in planned[:-2]:
        assert sum(len(block.keys) for block in read_extent(extent, rows, Columns(), ITEM_BYTES)) == rows
    with pytest.raises(SourceError, match=r"the data is damaged; make the file again\.$"):
        list(read_extent(*planned[-1], Columns(), ITEM_BYTES))


@pytest.mark.parametrize(
    "header",
    [
        ENDLESS,
        ENDLESS[:-1] + b"\x7f",
        b"\x18" + b"\xff" * 8 + b"\x7f",
        b"\x19\x1c",  # a list
        b"\x1c" * 10,  # nested structs
        b"\x15\x00" * 20,  # integers without end
        b"\x15\x00\x15\x7c\x15\x7c\x00",  # no header of its own page type
        b"\x15\x00\x15\x7c\x15\x7c\x2c\x15\x01\x00\x00",  # -1 values
        # The page's size of 62 bytes stands in fields that Arrow ignores.
        b"\x15\x00\x15\x7d\x15\x7c\x06\x04\x7c\x2c\x15\x02\x00\x00",
        b"\x15\x00\x15\x7d\x15\x7c\x05\x84\x80\x10\x7c\x2c\x15\x02\x00\x00",
    ],
)
def test_a_page_whose_header_cannot_be_read_is_refused(header: bytes, folder: Path) -> None:
    found = check(folder / "a.parquet", Damage(4, len(header), header).of(PARQUETS[1]))
    assert found == f"{folder}/a.parquet: the data is damaged; make the file again."


class CountedReads(io.BytesIO):
    """Bytes that count how many times they are read."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().read(size)


VARINTS = st.one_of(
    st.integers(0, 200).map(lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])),
    st.sampled_from([b"\x80" * 8 + b"\x01", b"\xff" * 8 + b"\x7f", ENDLESS[1:], b"\xff" * 30]),
)
FIELDS = st.builds(
    bytes.__add__, st.sampled_from([b"\x15", b"\x16", b"\x18", b"\x05", b"\x25", b"\x2c", b"\x17"]), VARINTS
)
HEADER = b"\x15\x00\x15\x08\x15\x08\x2c\x15\x02\x00\x00data"
HEADERS = st.lists(st.one_of(FIELDS, st.binary(max_size=20), st.just(b"\0"), st.just(HEADER)), max_size=40)


@settings(max_examples=1_000, derandomize=True)
@given(parts=HEADERS, start=st.integers(0, 20), size=st.integers(0, 600), values=st.integers(0, 50))
def test_any_bytes_are_pages_or_none(parts: list[bytes], start: int, size: int, values: int) -> None:
    raw = CountedReads(b"".join(parts))
    found = list(pages(raw, Stored(start, size, values, rows=values, repeated=False)))
    assert all(page.sound for page in found[:-1])
    assert sum(page.packed_bytes for page in found if page.sound) <= size
    assert raw.reads <= len(raw.getvalue()) + 1


def test_a_header_is_not_read_without_end() -> None:
    raw = CountedReads(b"\x15\x00" * 1_000_000)
    (page,) = pages(raw, Stored(0, 2_000_000, 1, rows=1, repeated=False))
    assert not page.sound
    assert raw.reads < 2_000


def test_a_column_that_repeats_without_being_a_list_is_read(folder: Path) -> None:
    # Protobuf's writers make such columns: rows have several values, and no path has a dot. Pages are those of a list.
    kind = pa.schema(
        [
            pa.field("text", pa.string(), nullable=False),
            pa.field("n", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        ]
    )
    file = io.BytesIO()
    rows = pa.table({"text": ["a", "b"], "n": [[1, 2, 3], [4, 5]]}, kind)
    pq.write_table(rows, file, store_schema=False, use_dictionary=False, write_statistics=False)
    data = file.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    schema = data[footer:-8]
    nested = schema[schema.index(b"\x35\x00\x18\x01n") : schema.index(b"\x07element\x00") + len(b"\x07element\x00")]
    for listed, plain in (
        (b"\x19\x5c", b"\x19\x3c"),  # three of five elements stay
        (nested, b"\x15\x02\x25\x04\x18\x01n\x00"),
        (b"\x19\x38\x01n\x04list\x07element", b"\x19\x18\x01n"),
    ):
        assert schema.count(listed) == 1
        schema = schema.replace(listed, plain)
    found = check(folder / "a.parquet", data[:footer] + schema + len(schema).to_bytes(4, "little") + b"PAR1")
    assert isinstance(found, list)
    assert [row[1:] for row in found] == [(b"a", "", b'{"n":[1,2,3]}'), (b"b", "", b'{"n":[4,5]}')]


LONG = b"x" * 5 * 1024 * 1024


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("row", [b"k1,%s,1", b'k1,"%s",1', b'k1,"said ""%s""",1'])
def test_a_csv_row_longer_than_any_that_is_read_is_rejected(row: bytes, end: bytes, folder: Path) -> None:
    lines = [b"id,text,n", b"k0,good,0", row % LONG, b"", b"k2,good,2"]
    found = check(folder / "a.csv", end.join(lines))
    size = len(row % LONG) + len(end) - 1
    assert isinstance(found, list)
    assert [(key, text, fault) for key, text, fault, _ in found] == [
        ("k0", b"good", ""),
        (None, None, f"3: the line has {size:,} bytes; at most 4,195,264 are read"),
        ("k2", b"good", ""),
    ]


def test_a_long_blank_line_is_no_row(folder: Path) -> None:
    line = b'{"text": "good", "n": 0}\n'
    assert len(check(folder / "a.jsonl", line + b" " * 5 * 1024 * 1024 + b"\n" + line)) == 2


@pytest.mark.parametrize("blank", ["\n", "\n\n\n", "\r\n"])
def test_lines_of_csv_are_counted_with_the_blank_ones(blank: str, folder: Path) -> None:
    found = check(folder / "a.csv", f"id,text,n\na,good,0\n{blank}b,,1\n{blank}c,,2\n{blank}d,,3\n".encode())
    blanks = blank.count("\n")
    assert isinstance(found, list)
    assert [fault for *_, fault, _ in found if fault] == [f"{2 + (1 + blanks) * at}: text is empty" for at in (1, 2, 3)]
