"""Parquet sink: part files, and the data set that they become when the job completes.

Workers write parts below `_staging/<job>/`, where readers of the folder don't look. A part counts once the fenced
commit has recorded its name; all other parts come from lost claims. When the job completes, its parts are moved to the
folder itself, then the manifest is written, and at last `_SUCCESS`. Every step is idempotent.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import structlog
from sqlalchemy import Connection, Engine

from pipeline.core import exact_json
from pipeline.core.chunks import Claim, Item
from pipeline.core.errors import SourceChanged, UserError, Waiting
from pipeline.core.jobs import Job
from pipeline.core.options import OUR_COLUMNS, PASSAGE_COLUMNS, VectorType
from pipeline.core.vectors import restored, stored
from pipeline.db import items, jobs, outputs
from pipeline.db.database import ping
from pipeline.db.embeddings import EmbeddedRows, Vector
from pipeline.db.outputs import Output, Staged
from pipeline.infra import storage

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
_STAGING = "_staging"
_CLAIM = "_job.json"
#: Concurrent moves of objects, as each takes a round trip or two.
_MOVES = 16
#: Pattern of parts' names, also of versions in which claims had no token, with the commit that a part is of.
_PART = re.compile(r"(part-\d+-\d+)(?:-[0-9a-f]{32})?(?:-(\d+))?\.parquet")

log = structlog.get_logger()


class Erased(NamedTuple):
    """Result of an erasure of keys from a job's files."""

    #: Items that nobody has counted as erased.
    unknown: int
    #: False: a file can't be found.
    is_whole: bool


class ParquetSink:
    """Sink that writes to a folder or URI of Parquet files."""

    finalizes = True

    def __init__(self, folder: str, kept_as: VectorType, carried: Sequence[str], *, passages: bool) -> None:
        self._folder, self._kept_as, self._carried, self._passages = folder, kept_as, carried, passages

    def prepare(self, job_id: UUID) -> None:
        """Occupy the folder, which must be empty.

        Raises:
            UserError: it isn't empty.
            StorageRefused, StorageUnreachable: it can't be written.
        """
        occupy(self._folder, job_id)

    def discard(self, job_id: UUID) -> None:
        """Delete the job's staged files."""
        vacate(self._folder, job_id)

    def fault(self, item: Item) -> str | None:  # noqa: ARG002 - any item has a place
        """Return None: every item fits."""
        return None

    def settled(self, engine: Engine, claim: Claim) -> set[int]:
        """Return the indexes in the chunk's recorded parts."""
        with engine.begin() as connection:
            written = outputs.of_job(connection, claim.job_id, claim.chunk_id)
        return set(indexes(self._folder, claim.job_id, written).tolist())

    def stage(self, claim: Claim, number: int, rows: EmbeddedRows) -> Staged | None:
        """Write a part file; `None`: there are no rows."""
        if not len(rows.indexes):
            return None
        output = write(self._folder, claim, number, rows)
        return Staged(output, storage.join(self._folder, output.name))

    def write(self, connection: Connection, claim: Claim, rows: EmbeddedRows, staged: Staged | None) -> None:  # noqa: ARG002
        """Record the part, which makes it count."""
        if staged:
            outputs.record(connection, claim, staged.output)

    def finalize(self, engine: Engine, job: Job) -> None:
        """Turn the recorded parts into a data set."""
        with engine.begin() as connection:
            written, space = outputs.of_job(connection, job.id), jobs.vector_space(connection, job.id)
            before = outputs.digest(connection, job.id)

        def check() -> None:
            """Raise `Waiting` if the job is gone or has ended, or its parts have changed.

            While this dispatcher was slow, another one may have completed the job, and a retry may have added parts.
            """
            with engine.begin() as connection:
                now = jobs.by_id(connection, job.id)
                if now is None or now.state.ended or outputs.digest(connection, job.id) != before:
                    raise Waiting("the job's parts have changed meanwhile.")

        about = {
            "name": job.name,
            "labels": job.labels,
            "model": job.model,
            "vector_space": space["fingerprint"],
            "dimensions": space["dimensions"],
            "dtype": self._kept_as,
            "carried": self._carried,
            **({"passages": True} if self._passages else {}),
        }
        make_data_set(self._folder, job.id, written, about, check)

    def erase(self, engine: Engine, job: Job, keys: Set[str], still: Callable[[], object]) -> Erased:
        """Write the parts anew that have one of the keys, one at a time, in staging; then let them take the places of
        those that they replace. What an earlier run has left is mended, too. Nothing else in the folder is touched, as
        others may have written to it.
        """
        with engine.begin() as connection:
            written = outputs.of_job(connection, job.id)
        there, missing, unknown = list[Output](), set[str](), 0
        for output in written:
            still()
            try:
                kept, items = self._erase_from(engine, job, output, keys)
            except SourceChanged:
                missing.add(output.name)
            else:
                there.append(kept)
                unknown += items
        staging = _staging(self._folder, job.id)
        seen = (set(visible_names(self._folder)), set(storage.names_below(staging)) - {_CLAIM})
        with _ended(engine, job) as connection:  # so that no worker adds a part
            counted = {output.name for output in outputs.of_job(connection, job.id)}
            if counted != missing | {output.name for output in there}:
                raise Waiting(f"the parts of job {job.id} have changed meanwhile")
            for act in self._replacements(job, there, counted, *seen):
                ping(connection)  # keeps the transaction, or shows that it has ended
                act()
        return Erased(unknown, is_whole=not missing)

    def _erase_from(self, engine: Engine, job: Job, output: Output, keys: Set[str]) -> tuple[Output, int]:
        """Return the part that counts now, this one if it has none of the keys, and the number of items that nobody has
        counted as erased.

        Raises:
            SourceChanged: it is gone.
            Waiting: the job is tried again.
        """
        with open_part(self._folder, job.id, output) as file:
            left = without_keys(file, keys)
        if left is None:
            return output, 0
        name = _name(output.chunk_id, output.fence, uuid4(), output.part)
        made = dataclasses.replace(output, name=name, rows=left.rows, bytes=len(left.data))
        staged = storage.join(_staging(self._folder, job.id), name)
        storage.write(staged, left.data)
        erased = pc.unique(left.gone["index"]).to_pylist()
        unknown = len(erased) if job.options.by_reference else 0  # others are erased from `items`
        passages = len(left.gone) if self._passages else 0
        try:
            with _ended(engine, job) as connection:
                if not outputs.replace(connection, job.id, output, made, erased, passages=passages, unknown=unknown):
                    raise Waiting(f"the parts of job {job.id} have changed meanwhile")
        except Waiting:
            storage.delete(staged)
            raise
        return made, unknown

    def _replacements(
        self, job: Job, there: Sequence[Output], counted: Set[str], visible: Set[str], staged: Set[str]
    ) -> Iterator[Callable[[], None]]:
        """Yield what is to be done so that the parts that are there take the places of those that they replace: moves,
        the manifest, and deletions of what doesn't count."""
        staging = _staging(self._folder, job.id)
        by_commit = {(_commit_of(output), output.part): output for output in there}
        replaced = {name for name in visible - counted if _commit_named(name) in by_commit}
        moved = {by_commit[_commit_named(name)].name for name in replaced} & staged
        for name in moved:
            yield partial(storage.move, storage.join(staging, name), storage.join(self._folder, name))
        if manifest := self._manifest_of(job.id):
            files = [_as_listed(by_commit.get(_commit_named(file["name"])), file) for file in manifest["files"]]
            if files != manifest["files"]:
                changed = {**manifest, "files": files, "rows": sum(file["rows"] for file in files)}
                made = orjson.dumps(changed, option=orjson.OPT_INDENT_2)
                yield partial(storage.write, storage.join(self._folder, MANIFEST), made)
        for name in replaced:
            yield partial(storage.delete, storage.join(self._folder, name))
        for name in staged - counted:
            yield partial(storage.delete, storage.join(staging, name))
        if counted and counted <= visible | moved:  # as of a job that has completed
            yield partial(vacate, self._folder, job.id)

    def _manifest_of(self, job_id: UUID) -> Any:
        """Return the manifest in the folder; None if there is none, or it is another job's."""
        if (found := storage.stat(storage.join(self._folder, MANIFEST))) is None:
            return None
        with storage.open_file(found.uri, found.etag) as file:
            manifest = orjson.loads(file.read())
        return manifest if manifest.get("job") == str(job_id) else None

    def takes_long(self, connection: Connection) -> bool:  # noqa: ARG002
        """Return False: parts are moved, not rewritten."""
        return False

    def conclude(self, connection: Connection, job: Job) -> str | None:  # noqa: ARG002
        """Do nothing: the manifest shows the parts already."""
        return None

    def read(
        self, connect: Callable[[], AbstractContextManager[Connection]], job_id: UUID, first_index: int, end_index: int
    ) -> Iterator[Sequence[Vector]]:
        """Yield the rows of each chunk from its parts."""
        passage_columns = PASSAGE_COLUMNS if self._passages else ()
        with connect() as connection:
            chunks = [
                chunk.outputs
                for chunk in outputs.by_chunk(connection, job_id)
                if chunk.outputs and chunk.first_index < end_index and chunk.first_index + chunk.items > first_index
            ]
        for parts in chunks:
            table = read(self._folder, job_id, parts).combine_chunks()
            if not len(table):  # all of it is forgotten
                continue
            kept = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False))
            vectors = restored(kept)
            carried = table.drop_columns([*OUR_COLUMNS, *passage_columns]).to_pylist()
            found, keys, tokens, truncated, *numbers = (
                table[name].to_pylist() for name in ("index", "key", "tokens", "truncated", *passage_columns)
            )
            rows = zip(found, keys, vectors, tokens, truncated, carried, *numbers, strict=True)
            yield [Vector(*row) for row in rows if first_index <= row[0] < end_index]

    def count_missing_and_double(self, connection: Connection, job: Job) -> tuple[int, int]:
        """Count by the indexes in the files. A file that readers see and no commit has recorded counts as double."""
        recorded = {output.name for output in outputs.of_job(connection, job.id)}
        missing, double = 0, sum(name not in recorded for name in visible_names(self._folder))
        for chunk in outputs.by_chunk(connection, job.id):
            found = self._rows_there(job.id, chunk.outputs)
            rejected = items.settled(connection, job.id, chunk.first_index, chunk.items)
            rows = set(found)
            vectors = {index for index, _ in rows}
            own = range(chunk.first_index, chunk.first_index + chunk.items)
            strangers = sum(index not in own for index in vectors)
            good = len(vectors) - strangers
            missing += max(0, chunk.written - good) + max(0, chunk.rejected - len(rejected)) + chunk.unaccounted
            double += len(found) - len(rows) + strangers + len(vectors & rejected)
            double += max(0, good - chunk.written) + max(0, len(rejected) - chunk.rejected)
            if self._passages:
                # Each item has its passages from 0 on.
                missing += max(
                    chunk.passages - len(rows), sum(n > 0 and (index, n - 1) not in rows for index, n in rows)
                )
                double += max(0, len(rows) - chunk.passages)
        return missing, double

    def _rows_there(self, job_id: UUID, parts: Sequence[Output]) -> list[tuple[int, int]]:
        """Return the index and the passage of each row in the parts, without parts that are gone."""
        found: list[tuple[int, int]] = []
        for part in parts:
            with suppress(SourceChanged), open_part(self._folder, job_id, part) as file:
                table = file.read(columns=["index", "passage"] if self._passages else ["index"])
                numbers = table["passage"].to_pylist() if self._passages else [0] * len(table)
                found += zip(table["index"].to_pylist(), numbers, strict=True)
        return found


def schema(dimensions: int, kept_as: VectorType, carried: Sequence[str], *, passages: bool) -> Any:
    """Return the schema of a file of vectors. Carried JSON values are kept as text, as a column may mix types."""
    element = pa.field("item", pa.from_numpy_dtype(kept_as.value), nullable=False)
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("key", pa.string()),
            pa.field("embedding", pa.list_(element, dimensions), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in (PASSAGE_COLUMNS if passages else ())),
            *(pa.field(name, pa.string()) for name in carried),
        ]
    )


def name_of(claim: Claim, number: int) -> str:
    """Return the file name of commit `number` of a claim."""
    return _name(claim.chunk_id, claim.fence, claim.token, number)


def _name(chunk_id: int, fence: int, token: UUID, number: int) -> str:
    return f"part-{chunk_id}-{fence}-{token.hex}{f'-{number}' if number else ''}.parquet"


def write(folder: str, claim: Claim, number: int, rows: EmbeddedRows) -> Output:
    """Write a part atomically, and return its description. The part counts once a commit has recorded that.

    Raises:
        StorageRefused, StorageUnreachable: it can't be written.
    """
    carried, kept_as = claim.options.columns.carry, claim.options.dtype
    values = [exact_json.loads(row) if row else {} for row in rows.carried] if carried else []
    kind = schema(rows.vectors.shape[1], kept_as, carried, passages=rows.passages is not None)
    flat = pa.array(stored(rows.vectors, kept_as).ravel())
    batch = pa.record_batch(
        [
            pa.array(rows.indexes),
            pa.array(rows.keys, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, type=kind.field("embedding").type),
            pa.array(rows.tokens),
            pa.array(rows.truncated),
            *map(pa.array, rows.passages or ()),
            *(pa.array([as_text(value.get(name)) for value in values], pa.string()) for name in carried),
        ],
        schema=kind,
    )
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, kind, **WRITING) as writer:
        writer.write_batch(batch)
    output = Output(
        chunk_id=claim.chunk_id,
        fence=claim.fence,
        part=number,
        name=name_of(claim, number),
        rows=len(rows.indexes),
        bytes=buffer.tell(),
    )
    storage.write(storage.join(_staging(folder, claim.job_id), output.name), buffer.getbuffer())
    return output


#: Options of Parquet's writer. Vectors hardly compress and need no dictionary; only the keys get one.
WRITING: Mapping[str, Any] = {"compression": "zstd", "use_dictionary": ["key"]}


def as_text(value: Any) -> str | None:
    """Return a carried value as text: strings and None as they are, other values as JSON."""
    return value if value is None or isinstance(value, str) else exact_json.dumps(value).decode()


@dataclass(frozen=True, slots=True)
class Left:
    """Parquet file without some keys."""

    rows: int
    data: memoryview
    #: The rows that it hasn't, without vectors.
    gone: Any


def without_keys(file: Any, keys: Set[str]) -> Left | None:
    """Return a Parquet file of vectors without the rows of some keys; `None`: it has none of them."""
    named = pc.is_in(file.read(columns=["key"])["key"], value_set=pa.array(sorted(keys), pa.string()))
    if not pc.any(named).as_py():
        return None
    table = file.read()
    left, gone = table.filter(pc.invert(named)), table.drop_columns(["embedding"]).filter(named)
    buffer = io.BytesIO()
    pq.write_table(left, buffer, **WRITING)
    return Left(len(left), buffer.getbuffer(), gone)


def _staging(folder: str, job_id: UUID) -> str:
    return storage.join(folder, f"{_STAGING}/{job_id}")


def occupy(folder: str, job_id: UUID) -> None:
    """Occupy an empty folder for a job's output by writing a file to it, which proves that it can be written.

    Raises:
        UserError: the folder isn't empty.
        StorageRefused, StorageUnreachable: it can't be written.
    """
    ours = f"{_STAGING}/{job_id}/"
    for name in storage.names_below(folder):
        if not name.startswith(ours):
            raise UserError(f"{name} is there already; give an empty folder.", field="output", given=folder)
    storage.write(storage.join(_staging(folder, job_id), _CLAIM), orjson.dumps({"job": str(job_id)}))


def vacate(folder: str, job_id: UUID) -> None:
    """Delete a job's files below `_staging`."""
    storage.delete_folder(_staging(folder, job_id))


def make_data_set(
    folder: str,
    job_id: UUID,
    parts: Sequence[Output],
    about: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Turn a completed job's parts into a data set, and remove all other parts from the folder.

    It is idempotent, also after an interruption at any point. `check` is called before anything is deleted, and raises
    if the parts aren't the job's any more.

    Raises:
        StorageRefused, StorageUnreachable: it isn't finished.
    """
    check()
    _remove_strays(folder, {output.name for output in parts})

    def promote(output: Output) -> None:
        storage.move(storage.join(_staging(folder, job_id), output.name), storage.join(folder, output.name))

    with ThreadPoolExecutor(_MOVES) as pool:
        for _ in pool.map(promote, parts):
            pass
    files = [{"name": output.name, "rows": output.rows, "bytes": output.bytes} for output in parts]
    manifest = {**about, "job": str(job_id), "rows": sum(output.rows for output in parts), "files": files}
    # Written in the staging folder, so that `vacate` removes what a crash in the middle of the write leaves.
    made = storage.join(_staging(folder, job_id), MANIFEST)
    storage.write(made, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    storage.move(made, storage.join(folder, MANIFEST))
    check()
    vacate(folder, job_id)
    storage.write(storage.join(folder, SUCCESS), b"")


def _remove_strays(folder: str, listed: Collection[str]) -> None:
    """Delete parts that readers see and no commit lists: the database has lost the commits that recorded them."""
    strays = [name for name in visible_names(folder) if _PART.fullmatch(name) and name not in listed]
    if strays:
        storage.delete(storage.join(folder, SUCCESS))  # the data set that it vouches for changes
    for name in strays:
        log.warning("stray_part_removed", folder=folder, name=name)
        storage.delete(storage.join(folder, name))


@contextmanager
def _ended(engine: Engine, job: Job) -> Iterator[Connection]:
    """Open a short transaction in which a job that has ended isn't tried again.

    Raises:
        Waiting: it is.
    """
    with engine.begin() as connection:
        now = jobs.lock(connection, job.id)
        if now is None or not now.state.ended:
            raise Waiting(f"job {job.id} is tried again")
        yield connection


def _commit_of(output: Output) -> str:
    return f"part-{output.chunk_id}-{output.fence}"


def _commit_named(name: str) -> tuple[str, int]:
    """Return the commit that a part is of, as beginning of its name and number; of another file nothing like it."""
    found = _PART.fullmatch(name)
    return (found[1], int(found[2] or 0)) if found else ("", 0)


def _as_listed(output: Output | None, file: dict[str, Any]) -> dict[str, Any]:
    return {"name": output.name, "rows": output.rows, "bytes": output.bytes} if output else file


def open_part(folder: str, job_id: UUID, output: Output) -> pq.ParquetFile:
    """Open a recorded part, in the staging folder or in the job's folder.

    Raises:
        SourceChanged: it is gone.
    """
    for place in (_staging(folder, job_id), folder):
        found = storage.stat(storage.join(place, output.name))
        if found:
            return pq.ParquetFile(storage.open_file(found.uri, found.etag))
    raise SourceChanged(f"{storage.join(folder, output.name)}: this part of job {job_id} is gone.")


def names_of_parts(folder: str, job_id: UUID) -> set[str]:
    """Return the names of the parts in a job's staging folder and in its folder."""
    # Listed in the direction in which parts move: one that is moved between the two listings is found in the second.
    return {*visible_names(_staging(folder, job_id)), *visible_names(folder)}


def indexes(folder: str, job_id: UUID, parts: Sequence[Output]) -> npt.NDArray[np.int64]:
    """Return the indexes in recorded parts, in the order of the files.

    Raises:
        SourceChanged: a part is gone.
    """
    found = [np.zeros(0, np.int64)]
    for output in parts:
        with open_part(folder, job_id, output) as part:
            found.append(part.read(columns=["index"])["index"].to_numpy())
    return np.concatenate(found)


def visible_names(folder: str) -> Iterator[str]:
    """Yield the names of the Parquet files that a reader of the folder sees."""
    return (name for name in storage.names_below(folder) if name.endswith(".parquet") and name[0] not in "_.")


def read(folder: str, job_id: UUID, parts: Sequence[Output]) -> pa.Table:
    """Return the rows of recorded parts in index order.

    Raises:
        SourceChanged: a part is gone.
    """
    tables = []
    for output in parts:
        with open_part(folder, job_id, output) as part:
            tables.append(part.read())
    table = pa.concat_tables(tables)
    keys = [name for name in ("index", "passage") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in keys])
