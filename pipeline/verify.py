"""Verification of a receipt: what a job wrote, counted row by row against what its chunks say."""

from collections.abc import Sequence
from uuid import UUID

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from pipeline import parts, status
from pipeline.errors import SourceChanged
from pipeline.job_status import Receipt
from pipeline.jobs import Job
from pipeline.store import embeddings, items, outputs
from pipeline.store.outputs import Output


def verified_receipt(connection: Connection, job_id: UUID) -> Receipt:
    """A job's receipt, with what counting its rows says.

    It is `verified` when nothing is missing or double, it balances, and the chunks still say what was frozen.
    """
    job, found = status.known_job(connection, job_id), status.receipt(connection, job_id)
    missing, double = count_missing_and_double(connection, job)
    now = status.current_account(connection, job_id)
    # A lost claim's request may be answered after the job's end, and is billed then; nothing else may change.
    same = ("prompt", "reused")
    unchanged = found.items == now.items and all(getattr(found.tokens, x) == getattr(now.tokens, x) for x in same)
    verified = found.balanced and unchanged and not missing and not double
    return found.model_copy(update={"verified": verified, "missing": missing, "double": double})


def count_missing_and_double(connection: Connection, job: Job) -> tuple[int, int]:
    """(missing, double) of a job.

    Missing are items that have neither vector nor reject beyond those that are cancelled or still open, and vectors
    and rejects that a chunk counts and that aren't there. Double are items with both, or with two vectors, and vectors
    and rejects beyond those that a chunk counts: of items that were also cancelled, or of no item at all.
    """
    if job.options.output:
        return _count_parts(connection, job.id, job.options.output)
    if job.options.by_reference:
        return embeddings.verify_without_items(connection, job.id, job.items_total)
    return embeddings.verify(connection, job.id)


def _count_parts(connection: Connection, job_id: UUID, folder: str) -> tuple[int, int]:
    missing = 0
    double = _strays(connection, job_id, folder)
    for chunk in outputs.by_chunk(connection, job_id):
        found = _indexes(folder, job_id, chunk.outputs)
        rejected = items.settled(connection, job_id, chunk.first_index, chunk.items)
        vectors = set(found.tolist())
        own = range(chunk.first_index, chunk.first_index + chunk.items)
        strangers = sum(index not in own for index in vectors)
        good = len(vectors) - strangers
        missing += max(0, chunk.embedded - good) + max(0, chunk.rejected - len(rejected)) + chunk.unaccounted
        double += len(found) - len(vectors) + strangers + len(vectors & rejected)
        double += max(0, good - chunk.embedded) + max(0, len(rejected) - chunk.rejected)
    return missing, double


def _indexes(folder: str, job_id: UUID, written: Sequence[Output]) -> npt.NDArray[np.int64]:
    """The indexes in those parts that are there."""
    found = [np.zeros(0, np.int64)]
    for output in written:
        try:
            found.append(parts.indexes(folder, job_id, [output]))
        except SourceChanged:
            continue
    return np.concatenate(found)


def _strays(connection: Connection, job_id: UUID, folder: str) -> int:
    """Parquet files where readers look that no commit has recorded."""
    recorded = {output.name for output in outputs.of_job(connection, job_id)}
    return sum(name not in recorded for name in parts.visible_names(folder))
