"""Parquet sink: part files, and the data set that they become when the job completes.

Workers write parts below `_staging/<job>/`, where readers of the folder don't look. A part counts once the fenced
commit has recorded its name; all other parts come from lost claims. When the job completes, its parts are moved to the
folder itself, then the manifest is written, and at last `_SUCCESS`. Every step is idempotent.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, suppress
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, Engine

from pipeline.chunk_io import parquet_parts
from pipeline.chunk_io.parquet_data_set import make_data_set, occupy, vacate
from pipeline.chunk_io.parquet_erasure import Erased, erase_keys
from pipeline.core.chunks import Claim, Item
from pipeline.core.errors import SourceChanged, Waiting
from pipeline.core.jobs import Job
from pipeline.core.options import OUR_COLUMNS, PASSAGE_COLUMNS, VectorType
from pipeline.core.vectors import restored
from pipeline.db import items, jobs, outputs
from pipeline.db.embeddings import EmbeddedRows, Vector
from pipeline.db.outputs import Output, Staged
from pipeline.infra import storage


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
        return set(parquet_parts.indexes(self._folder, claim.job_id, written).tolist())

    def stage(self, claim: Claim, number: int, rows: EmbeddedRows) -> Staged | None:
        """Write a part file; `None`: there are no rows."""
        if not len(rows.indexes):
            return None
        output = parquet_parts.write(self._folder, claim, number, rows)
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
        """Write the parts anew that have one of the keys, one at a time."""
        return erase_keys(self._folder, engine, job, keys, still)

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
            table = parquet_parts.read(self._folder, job_id, parts).combine_chunks()
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
        missing, double = 0, sum(name not in recorded for name in parquet_parts.visible_names(self._folder))
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
            with suppress(SourceChanged), parquet_parts.open_part(self._folder, job_id, part) as file:
                table = file.read(columns=["index", "passage"] if self._passages else ["index"])
                numbers = table["passage"].to_pylist() if self._passages else [0] * len(table)
                found += zip(table["index"].to_pylist(), numbers, strict=True)
        return found
