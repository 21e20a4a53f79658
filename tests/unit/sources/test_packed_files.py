"""Compressed files and streams: read whole, and refused if they are truncated or bombs."""

import gzip
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus
from tests.unit.sources.written import GOOD, ITEM_BYTES, MIB, put, put_parquet, read, refusal

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
    # The limit is 1,000-fold, since gzip can't do better than 1,032-fold.
    assert str(refused.value).endswith(
        f"{name}: the {packing} data grows over 1,000-fold after line 1; unpack it first if that is right."
    )


def test_a_zstd_window_past_what_is_held_is_refused() -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    put("a.jsonl.zst", packer.compress(GOOD.encode()) + packer.flush())
    assert refusal("a.jsonl.zst") == (
        "a.jsonl.zst: the zstd data needs too much memory after line 0; pack it again without a long window."
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
