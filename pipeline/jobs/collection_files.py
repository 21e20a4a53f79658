"""Parquet files of collections: a full set, then the changes of each sync, written after its end.

A file counts once the transaction that made its set has recorded it; then the manifest shows the set. Whatever else
lies there under our names was left by an interruption, or is replaced, and goes. Every step can be done again.
"""

import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from pipeline.chunk_io.parquet_data_set import MANIFEST
from pipeline.chunk_io.parquet_parts import WRITING, as_text, without_keys
from pipeline.core.errors import StorageUnreachable, UserError, VectormillError, Waiting
from pipeline.core.options import PASSAGE_COLUMNS, JobOptions, VectorType
from pipeline.db import collection_files, collections
from pipeline.db.collection_files import CollectionFile, FilesState, Row
from pipeline.db.collections import Collection as Version
from pipeline.db.database import held
from pipeline.infra import storage

#: Columns of ours beside those of jobs' files: number of the set that a row came with, and whether its key went.
VERSION, DELETED = "_version", "_deleted"
#: Rows that are read at once, and the size at which a file is full.
_BLOCK, _FILE_BYTES = 2_000, 64 * 2**20
#: Longest time between two tries while somebody else writes the same files.
_BUSY_SECONDS = 30.0
_EMPTY = b'{"version":0,"files":[]}'
_FILE = re.compile(r"(full|delta)-\d{6,}-[0-9a-f]{32}-\d+\.parquet")
_MANIFEST_OF = re.compile(r"_manifest-(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class _Kind:
    """Form of a version's files."""

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
    """Occupy an empty folder for a version's files, which proves that they can be written. An empty manifest stands for
    no set, and shows later that the folder is the right one.

    Raises:
        UserError: it isn't empty, or a carried column is called as one of ours.
        StorageRefused, StorageUnreachable: it can't be written.
    """
    if taken := next((name for name in (VERSION, DELETED) if name in carried), None):
        raise UserError(f'the files have a column "{taken}" already; rename it.', field="carry")
    place = storage.join(folder, MANIFEST)
    # One that made nothing of its folder has left the manifest.
    unused = False
    if found := storage.stat(place):
        with storage.open_file(found.uri, found.etag) as file:
            unused = file.read() == _EMPTY
    if there := next((name for name in storage.names_below(folder) if name != MANIFEST or not unused), None):
        raise UserError(f"{there} is there already; give an empty folder.", field="output", given=folder)
    storage.write(place, _EMPTY)


def write_files(engine: Engine, version_id: int) -> None:
    """Write the changes of a version since its newest set, or all of it as a full set, and let readers see them.

    Raises:
        Waiting: somebody else writes them.
        StorageRefused, StorageUnreachable: they can't be written. The version says why.
    """
    with _files_of(engine, version_id) as files:
        if files:
            files.catch_up()


def erase_keys(engine: Engine, version_id: int, keys: Set[str]) -> None:
    """Write the files of a version anew that have one of these keys, without them, one at a time.

    Raises:
        As `write_files`.
    """
    with _files_of(engine, version_id) as files:
        if files:
            files.erase(keys)


@contextmanager
def _files_of(engine: Engine, version_id: int) -> Iterator["_Files | None"]:
    """Yield the files of a version, which nobody else writes meanwhile; None if it has none. The version says what
    went wrong."""
    with engine.begin() as connection:
        version = collections.of_version(connection, version_id)
    if version is None or version.output is None:
        yield None
        return
    # Before any snapshot is taken.
    with held(engine, f"vectormill collection files {version_id}") as still:
        if still is None:
            raise Waiting(f"somebody else writes to {version.output}", most_seconds=_BUSY_SECONDS)
        try:
            yield _Files(engine, version, version.output, still)
        except Exception as error:
            with engine.begin() as connection:
                collection_files.note_problem(connection, version_id, _problem_of(error))
            raise


def _problem_of(error: Exception) -> str:
    """Return why files can't be written, for a person."""
    return str(error) if isinstance(error, VectormillError) else f"{type(error).__name__}; see the dispatcher's log"


@dataclass(frozen=True, slots=True)
class _Files:
    """Files of a version, while nobody else writes them."""

    engine: Engine
    version: Version
    folder: str
    #: Raises if somebody else may write now.
    still: Callable[[], None]

    @property
    def _id(self) -> int:
        return self.version.version_id

    def _state(self) -> tuple[FilesState, list[CollectionFile]]:
        with self.engine.begin() as connection:
            return collection_files.state(connection, self._id), collection_files.of_version(connection, self._id)

    def _names_there(self) -> set[str]:
        """Return the names of the files that are there.

        Raises:
            StorageUnreachable: it is another folder than the one that was occupied.
        """
        there = set(storage.names_below(self.folder))
        if MANIFEST not in there:
            raise StorageUnreachable(
                f"{self.folder}: {MANIFEST} is missing; mount the folder where dispatchers run, or put it back."
            )
        return there

    def catch_up(self) -> None:
        """Write what changed, and show it."""
        there, (state, counted) = self._names_there(), self._state()
        if state.shown < state.number:  # an interruption came between
            self._show()
        names = {file.name for file in counted}
        self._delete(name for name in there - names if _FILE.fullmatch(name))
        # The database may have gone back to a time before a full set replaced them.
        full = state.compacts or not counted or not names <= there
        if full or state.changed:
            self._write_set(full=full)
        self._show()

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.still()
            storage.delete(storage.join(self.folder, name))

    def _write_set(self, *, full: bool) -> None:
        with self.engine.connect() as connection:
            connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                collection_files.begin_set(connection)
                number = collection_files.state(connection, self._id).number + 1
                blocks = collection_files.rows(connection, self._id, full=full, block=_BLOCK)
                files = list(self._written(blocks, number, f"{'full' if full else 'delta'}-{number:06}-{uuid4().hex}"))
                self.still()
                collection_files.end_set(connection, self._id, number, files, full=full)

    def _written(self, blocks: Iterator[list[Row]], number: int, stem: str) -> Iterator[CollectionFile]:
        """Write rows to files, and yield these."""
        kind = _kind_of(self.version)
        for at in count():
            buffer, rows = io.BytesIO(), 0
            if (block := next(blocks, None)) is None:
                return
            with pq.ParquetWriter(buffer, kind.schema, **WRITING) as writer:
                while block is not None:
                    writer.write_batch(kind.batch(block, number))
                    rows += len(block)
                    block = next(blocks, None) if buffer.tell() < _FILE_BYTES else None
            name = f"{stem}-{at}.parquet"
            self.still()
            storage.write(storage.join(self.folder, name), buffer.getbuffer())
            yield CollectionFile(name=name, number=number, rows=rows, bytes=buffer.tell())

    def _show(self) -> None:
        """Write the manifest of the newest set, and delete what it replaces."""
        state, files = self._state()
        manifest = _manifest(self.version, state, files)
        own = f"_manifest-{state.number:06}.json"
        for name in (own, MANIFEST):
            storage.write(storage.join(self.folder, name), manifest)
        there, counted = set(storage.names_below(self.folder)), {file.name for file in files}
        strays = [name for name in there if _FILE.fullmatch(name) and name not in counted]
        manifests = {name: int(found[1]) for name in there if (found := _MANIFEST_OF.fullmatch(name))}
        # Those before may name the strays; later ones are of a time that the database has forgotten.
        self._delete(name for name, number in manifests.items() if number > state.number or (strays and name != own))
        self._delete(strays)
        with self.engine.begin() as connection:
            collection_files.note_shown(connection, self._id, state.number)

    def erase(self, keys: Set[str]) -> None:
        """Write the files anew that have one of these keys, and show them."""
        there = self._names_there()
        with self.engine.begin() as connection:
            collection_files.forget_changes(connection, self._id, sorted(keys))
        for file in self._state()[1]:
            if file.name not in there:  # a full set leaves it out
                with self.engine.begin() as connection:
                    collection_files.compact(connection, self._id)
                continue
            self.still()
            self._erase_from(file, keys)
        self._show()

    def _erase_from(self, file: CollectionFile, keys: Set[str]) -> None:
        found = storage.stat(storage.join(self.folder, file.name))
        if found is None:
            raise StorageUnreachable(f"{self.folder}: {file.name} has gone just now.")
        left = without_keys(pq.ParquetFile(storage.open_file(found.uri, found.etag)), keys)
        if left is None:
            return
        made = None
        if left.rows:
            name = f"{file.name.partition('-')[0]}-{file.number:06}-{uuid4().hex}-0.parquet"
            made = CollectionFile(name=name, number=file.number, rows=left.rows, bytes=len(left.data))
            storage.write(storage.join(self.folder, name), left.data)
        self.still()
        with self.engine.begin() as connection:
            collection_files.replace(connection, self._id, file.name, made)


def _manifest(version: Version, state: FilesState, files: Sequence[CollectionFile]) -> bytes:
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
