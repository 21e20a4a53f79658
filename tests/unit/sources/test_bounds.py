"""Memory bounds of readers: lines, blocks and dictionaries are never held whole."""

import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.chunks import RejectCode
from pipeline.core.options import Columns
from pipeline.sources import Corpus
from pipeline.sources.decode import whole_lines
from pipeline.sources.validation import BLOCK_BYTES, BLOCK_ROWS, LongLine
from tests.unit.sources.written import GOOD, MIB, put, put_parquet, read


@given(st.lists(st.one_of(st.just(b"\n"), st.binary(max_size=6)), max_size=30).map(b"".join), st.integers(1, 9))
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
