"""Parquet files of collections: a full set, then the changes of each sync, written after its end.

A file counts once the transaction that made its set has recorded it; then the manifest shows the set. Whatever else
lies there under our names was left by an interruption, or is replaced, and goes. Every step can be done again.
"""

import io
import re
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.parquet_sink import MANIFEST, WRITING, as_text, without_keys
from pipeline.core.errors import StorageRefused, StorageUnreachable, UserError, Waiting
from pipeline.core.options import PASSAGE_COLUMNS, JobOptions, VectorType
from pipeline.db import collection_files, collections
from pipeline.db.collection_files import CollectionFile, Files, Row
from pipeline.db.collections import Collection as Version
from pipeline.infra import storage

#: Columns of ours beside those of jobs' files: number of the set that a row came with, and whether its key went.
VERSION, DELETED = "_version", "_deleted"
#: Rows that are read at once, and the size at which a file is full.
_BLOCK, _FILE_BYTES = 2_000, 64 * 2**20
#: Longest time between two tries while somebody else writes the same files.
_BUSY_SECONDS = 30.0
_FILE = re.compile(r"(full|delta)-\d{6,}-[0-9a-f]{32}-\d+\.parquet")
_MANIFEST_OF = re.compile(r"_manifest-(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a version's files look like."""

    dimensions: int
    kept_as: VectorType
    carried: tuple[str, ...]
    passages: bool

    @property
    def schema(self) -> Any:
        element = pa.field("item", pa.from_numpy_dtype(self.kept_as.value), nullable=False)
        return pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                *(pa.field(name, pa.int32()) for name in (PASSAGE_COLUMNS if self.passages else ())),
                *(pa.field(name, pa.string()) for name in self.carried),
                pa.field("tokens", pa.int32()),
                pa.field("embedding", pa.list_(element, self.dimensions)),
                pa.field(VERSION, pa.int32(), nullable=False),
                pa.field(DELETED, pa.bool_(), nullable=False),
            ]
        )

    def batch(self, rows: list[Row], number: int) -> Any:
        """Return rows as a batch of set `number`."""
        gone = np.array([row.vector is None for row in rows])
        wire = np.dtype(self.kept_as.value).newbyteorder(">")
        vectors = np.zeros((len(rows), self.dimensions), self.kept_as.value)
        for at, row in enumerate(rows):
            if row.vector is not None:
                vectors[at] = np.frombuffer(row.vector, wire, offset=4)
        schema = self.schema
        columns = {
            "key": pa.array([row.key for row in rows]),
            "passage": pa.array([row.passage for row in rows], pa.int32()),
            "start": pa.array([row.start for row in rows], pa.int32()),
            "stop": pa.array([row.stop for row in rows], pa.int32()),
            "tokens": pa.array([row.tokens for row in rows], pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel()), type=schema.field("embedding").type, mask=pa.array(gone)
            ),
            VERSION: pa.array([number] * len(rows), pa.int32()),
            DELETED: pa.array(gone),
            **{
                name: pa.array([as_text((row.carried or {}).get(name)) for row in rows], pa.string())
                for name in self.carried
            },
        }
        return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _kind_of(version: Version) -> _Kind:
    options = JobOptions.model_validate(dict(version.options))
    return _Kind(version.dimensions, options.dtype, options.columns.carry, options.splits)


def prepare(folder: str, carried: Collection[str]) -> None:
    """Occupy an empty folder for a version's files, which proves that they can be written.

    Raises:
        UserError: it isn't empty, or a carried column is called as one of ours.
        StorageRefused, StorageUnreachable: it can't be written.
    """
    if taken := next((name for name in (VERSION, DELETED) if name in carried), None):
        raise UserError(f'the files have a column "{taken}" already; rename it.', field="carry")
    if there := next(iter(storage.names_below(folder)), None):
        raise UserError(f"{there} is there already; give an empty folder.", field="output", given=folder)
    storage.write(storage.join(folder, MANIFEST), orjson.dumps({"version": 0, "files": []}))


def write_files(engine: Engine, version_id: int) -> None:
    """Write the changes of a version since its newest set, or all of it as a full set, and let readers see them.

    Raises:
        Waiting: somebody else writes them.
        StorageRefused, StorageUnreachable: they can't be written. The version says why.
    """
    with engine.begin() as connection:
        version = collections.of_version(connection, version_id)
    if version is None or version.output is None:
        return
    with _noting_problems(engine, version_id):
        with _writing(engine, version_id) as connection:
            there, counted = (
                set(storage.names_below(version.output)),
                collection_files.of_version(connection, version_id),
            )
            # The database may have gone back to a time before a full set replaced them.
            is_whole = there.issuperset(file.name for file in counted)
            _sweep(version.output, there, {file.name for file in counted})
            state = collection_files.state(connection, version_id)
            full = state.compacts or not counted or not is_whole
            if full or state.changed:
                _write_set(connection, version, version.output, full=full)
        _show(engine, version, version.output)


@contextmanager
def _noting_problems(engine: Engine, version_id: int) -> Iterator[None]:
    try:
        yield
    except (StorageRefused, StorageUnreachable) as error:
        with engine.begin() as connection:
            collection_files.note_problem(connection, version_id, str(error))
        raise


@contextmanager
def _writing(engine: Engine, version_id: int) -> Iterator[Connection]:
    """Open a transaction that sees one snapshot, and alone writes a version's files."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            if not collection_files.lock(connection, version_id):
                raise Waiting("somebody else writes these files", most_seconds=_BUSY_SECONDS)
            yield connection


def _write_set(connection: Connection, version: Version, folder: str, *, full: bool) -> None:
    kind = _kind_of(version)
    blocks = collection_files.rows(connection, version.version_id, full=full, block=_BLOCK)
    first = next(blocks, None)
    number = collection_files.state(connection, version.version_id).number + 1
    stem = f"{'full' if full else 'delta'}-{number:06}-{uuid4().hex}"
    files, buffer, writer, rows = list[CollectionFile](), io.BytesIO(), None, 0

    def close() -> None:
        nonlocal writer, buffer, rows
        if writer is None:
            return
        writer.close()
        name = f"{stem}-{len(files)}.parquet"
        storage.write(storage.join(folder, name), buffer.getbuffer())
        files.append(CollectionFile(name=name, number=number, rows=rows, bytes=buffer.tell()))
        writer, buffer, rows = None, io.BytesIO(), 0

    while first is not None:
        writer = writer or pq.ParquetWriter(buffer, kind.schema, **WRITING)
        writer.write_batch(kind.batch(first, number))
        rows += len(first)
        if buffer.tell() >= _FILE_BYTES:
            close()
        first = next(blocks, None)
    close()
    collection_files.end_set(connection, version.version_id, number, files, full=full)


def _show(engine: Engine, version: Version, folder: str) -> None:
    """Write the manifest of the newest set, and delete what it replaces."""
    with _writing(engine, version.version_id) as connection:
        state = collection_files.state(connection, version.version_id)
        files = collection_files.of_version(connection, version.version_id)
        manifest = _manifest(version, state, files)
        for name in (f"_manifest-{state.number:06}.json", MANIFEST):
            storage.write(storage.join(folder, name), manifest)
        collection_files.note_shown(connection, version.version_id, state.number)
        _sweep(folder, set(storage.names_below(folder)), {file.name for file in files}, before=state.number)


def _manifest(version: Version, state: Files, files: Sequence[CollectionFile]) -> bytes:
    kind = _kind_of(version)
    about = {
        "version": state.number,
        "collection": version.name,
        "model": version.model,
        "dimensions": version.dimensions,
        "dtype": kind.kept_as,
        "carried": kind.carried,
        **({"passages": True} if kind.passages else {}),
        "written_at": state.written_at,
        "rows": state.rows,
        "files": [{"name": each.name, "rows": each.rows, "bytes": each.bytes} for each in files],
    }
    return orjson.dumps(about, option=orjson.OPT_INDENT_2)


def _sweep(folder: str, there: Set[str], counted: Set[str], *, before: int = 0) -> None:
    """Delete our files that don't count, and with them the manifests of sets `before` this one, which may name them."""
    strays = [name for name in there if _FILE.fullmatch(name) and name not in counted]
    manifests = [name for name in there if (found := _MANIFEST_OF.fullmatch(name)) and int(found[1]) < before]
    for name in [*manifests, *strays] if strays else []:
        storage.delete(storage.join(folder, name))


def erase_keys(engine: Engine, version_id: int, keys: Set[str]) -> None:
    """Write the files anew that have one of these keys, without them, one at a time.

    Raises:
        As `write_files`.
    """
    with engine.begin() as connection:
        version = collections.of_version(connection, version_id)
    if version is None or version.output is None:
        return
    with _noting_problems(engine, version_id):
        with engine.begin() as connection:
            collection_files.forget_changes(connection, version_id, sorted(keys))
            names = [file.name for file in collection_files.of_version(connection, version_id)]
        for name in names:
            _erase_from_file(engine, version, version.output, name, keys)
        _show(engine, version, version.output)


def _erase_from_file(engine: Engine, version: Version, folder: str, name: str, keys: Set[str]) -> None:
    with _writing(engine, version.version_id) as connection:
        files = {file.name: file for file in collection_files.of_version(connection, version.version_id)}
        if name not in files or (found := storage.stat(storage.join(folder, name))) is None:
            return  # it is replaced meanwhile
        left = without_keys(pq.ParquetFile(storage.open_file(found.uri, found.etag)), keys)
        if left is None:
            return
        made = None
        if left.rows:
            kept = files[name]
            stem = name.partition("-")[0]
            made = CollectionFile(
                name=f"{stem}-{kept.number:06}-{uuid4().hex}-0.parquet",
                number=kept.number,
                rows=left.rows,
                bytes=len(left.data),
            )
            storage.write(storage.join(folder, made.name), left.data)
        collection_files.replace(connection, version.version_id, name, made)
