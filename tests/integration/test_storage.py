"""Storage of files: local ones, and objects on a real S3 server."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import SourceChanged, SourceError, StorageRefused, StorageUnreachable, UserError
from pipeline.core.options import Columns
from pipeline.infra import storage
from pipeline.sources import Corpus
from tests.chaos.disk import small_disk
from tests.support.object_store import content_of, environment_of, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server("bucket") as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, server: dict[str, str]) -> Iterator[str]:
    """Yield an empty folder."""
    if request.param == "local":
        yield str(tmp_path)
        return
    with environment_of(server):
        yield "s3://bucket/folder"
        for name in list(storage.names_below("s3://bucket/")):
            storage.delete(f"s3://bucket/{name}")


def put(folder: str, name: str, data: bytes = b"some bytes") -> storage.Stat:
    uri = storage.join(folder, name)
    storage.write(uri, data)
    found = storage.stat(uri)
    assert found
    assert (found.uri, found.bytes) == (uri, len(data))
    return found


def test_what_is_written_is_read(folder: str) -> None:
    data = os.urandom(3_000_000)
    found = put(folder, "a/b.bin", data)
    assert content_of(found.uri) == data
    with storage.open_file(found.uri, found.etag) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        file.seek(1_000_000)
        assert file.read(1_500_000) == data[1_000_000:2_500_000]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a disk that is full")
def test_a_full_disk_is_for_a_person_to_mend(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20, None) as disk:
        disk.fill()
        for name in ("file", "folder/file"):
            with pytest.raises(StorageRefused, match=r"no space left on device; make room, or fix the disk\.$"):
                storage.write(str(disk.folder / name), bytes(10_000))
        disk.clear()
        assert list(storage.names_below(str(disk.folder))) == []
        put(str(disk.folder), "file")


def test_what_isnt_there(folder: str) -> None:
    uri = storage.join(folder, "nothing")
    assert storage.stat(uri) is None
    assert content_of(uri) is None
    assert list(storage.names_below(uri)) == []
    storage.delete(uri)
    with pytest.raises(SourceChanged, match=r"nothing: the file was there when the job was made and is gone"):
        storage.open_file(uri, "etag")


def test_another_version_is_noticed_at_opening(folder: str) -> None:
    found = put(folder, "a")
    put(folder, "a", b"other bytes")
    with pytest.raises(SourceChanged, match=r"a: the file changed after it was listed; submit it again\.$"):
        storage.open_file(found.uri, found.etag)


def test_another_version_is_noticed_at_a_later_read(folder: str) -> None:
    found = put(folder, "a", bytes(20_000_000))
    with storage.open_file(found.uri, found.etag) as file:
        assert file.read(10) == bytes(10)
        put(folder, "a", bytes(19_999_999))
        with pytest.raises(SourceChanged):
            file.read()


def test_a_file_that_goes_is_noticed(folder: str) -> None:
    found = put(folder, "a", bytes(20_000_000))
    with storage.open_file(found.uri, found.etag) as file:
        file.read(10)
        storage.delete(found.uri)
        with pytest.raises(SourceChanged, match="is gone"):
            file.read()


def test_moving_may_be_repeated(folder: str) -> None:
    source, target = put(folder, "in/a").uri, storage.join(folder, "out/a")
    storage.move(source, target)
    storage.move(source, target)
    assert list(storage.names_below(folder)) == ["out/a"]
    storage.delete(target)
    with pytest.raises(SourceChanged, match="gone before it could be moved"):
        storage.move(source, target)


def test_a_folder_goes_with_all_that_is_in_it(folder: str) -> None:
    for name in ("out/_staging/job/.hidden", "out/_staging/job/a", "out/_staging/other/b"):
        put(folder, name)
    for job in ("job", "job", "none"):
        storage.delete_folder(storage.join(folder, f"out/_staging/{job}"))
    assert list(storage.names_below(folder)) == ["out/_staging/other/b"]
    storage.delete_folder(storage.join(folder, "out/_staging/other"))
    assert list(storage.names_below(folder)) == []
    assert not Path(folder, "out/_staging").exists()


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageRefused, match="there is a file where a folder must be"):
        storage.write(str(tmp_path / "out" / "part"), b"x")


def test_listings_leave_out_what_is_hidden(folder: str) -> None:
    for name in ("a", "x/b", "_staging/c", "x/.d", "_e"):
        put(folder, name)
    assert sorted(stat.uri for stat in storage.below(folder)) == [storage.join(folder, name) for name in ("a", "x/b")]
    assert sorted(storage.names_below(folder)) == ["_e", "_staging/c", "a", "x/.d", "x/b"]


@pytest.mark.parametrize("pattern", ["*.jsonl", "x/*.jsonl", "**/*.jsonl", "", "[ab].jsonl", "x/?.jsonl"])
def test_the_same_files_by_the_same_pattern(folder: str, pattern: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "x/c.jsonl", "x/y/d.jsonl", "x/y/e.txt"):
        put(folder, name, b'{"text": "x"}\n')
    expected = {
        "*.jsonl": ["a", "b"],
        "x/*.jsonl": ["x/c"],
        "**/*.jsonl": ["a", "b", "x/c", "x/y/d"],
        "": ["a", "b", "x/c", "x/y/d"],
        "[ab].jsonl": ["a", "b"],
        "x/?.jsonl": ["x/c"],
    }[pattern]
    corpus = Corpus([storage.join(folder, pattern)], Columns(), 100)
    assert [file.uri for file in corpus.files] == [storage.join(folder, f"{name}.jsonl") for name in expected]
    assert sum(len(rows.keys) for rows in corpus.blocks()) == len(expected)


def test_a_page_is_refused_before_memory_is_made_ready_for_it(folder: str) -> None:
    written = io.BytesIO()
    table = pa.table({"text": [f"some text, number {n}" for n in range(1_000)]})
    pq.write_table(table, written, compression="zstd", use_dictionary=False)
    data = bytearray(written.getvalue())
    # Overwrite the first page's header with one that claims 50 bytes packed and 1 GB unpacked.
    claimed = b"\x15\x00\x15\x80\xa8\xd6\xb9\x07\x15\x64\x2c\x15\xd0\x0f\x15\x00\x15\x06\x15\x06\x00\x00"
    data[4 : 4 + len(claimed)] = claimed
    put(folder, "a.parquet", bytes(data))
    corpus = Corpus([storage.join(folder, "a.parquet")], Columns(), 100)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(SourceError, match=r"a\.parquet: the data grows over 1,000-fold"):
        list(corpus.blocks())
    assert pa.default_memory_pool().max_memory() - before < 100_000_000


def test_nothing_matches(folder: str) -> None:
    put(folder, "a.txt")
    for pattern in ("*.csv", "a.txt", "nowhere/"):
        with pytest.raises(SourceError, match=r"no (such|object)|unknown kind"):
            Corpus([storage.join(folder, pattern)], Columns(), 100)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageUnreachable, match="is a directory"):
        storage.write(str(tmp_path / "a"), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_storage_refuses(server: dict[str, str]) -> None:
    with environment_of(server):
        with pytest.raises(StorageRefused, match=r"^s3://nowhere/a: no such bucket\.$"):
            storage.write("s3://nowhere/a", b"x")
        with pytest.raises(StorageRefused, match="no such bucket"):
            list(storage.names_below("s3://nowhere/"))
        with pytest.raises(UserError, match="credentials stay outside"):
            storage.stat("s3://key:secret@bucket/a")
    with pytest.raises(UserError, match=r"^ftp://x: ftp:// isn't known"):
        storage.is_remote("ftp://x")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "answer"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "no credentials"),
    ],
)
def test_a_storage_that_isnt_there(environment: dict[str, str], said: str) -> None:
    """The program runs in a process of its own, without the AWS variables of this one."""
    program = """
from pipeline.core import errors
from pipeline.infra import storage
try:
    storage.stat("s3://bucket/a")
except errors.VectormillError as error:
    print(type(error).__name__, error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # No cloud's metadata service answers here.
    environment = {**kept, **environment, "AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said in done.stdout, done.stdout
