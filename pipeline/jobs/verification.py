"""Verification of a receipt: the rows that a job wrote, counted one by one against its chunks' counts."""

from uuid import UUID

from sqlalchemy import Connection

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.job_status import Receipt
from pipeline.core.jobs import Job
from pipeline.jobs import status


def verified_receipt(connection: Connection, job_id: UUID) -> Receipt:
    """Return a job's receipt with the result of counting its rows.

    It is `verified` when nothing is missing or double, it balances, and the chunks still have the frozen counts.
    """
    job, found = status.known_job(connection, job_id), status.receipt(connection, job_id)
    missing, double = count_missing_and_double(connection, job)
    now = status.current_account(connection, job_id)
    # A lost claim's request to an upstream may be answered, and billed, after the job's end; nothing else may change.
    same = ("prompt", "reused")
    unchanged = found.items == now.items and all(getattr(found.tokens, x) == getattr(now.tokens, x) for x in same)
    verified = found.balanced and unchanged and not missing and not double
    return found.model_copy(update={"verified": verified, "missing": missing, "double": double})


def count_missing_and_double(connection: Connection, job: Job) -> tuple[int, int]:
    """Return (missing, double) of a job.

    Missing: items with neither vector nor reject, beyond those that are cancelled or still open; and vectors and
    rejects that a chunk counts but that don't exist. Double: items with both, or with two vectors; and vectors and
    rejects beyond those that a chunk counts, because their item was also cancelled or doesn't exist.
    """
    return sink_of(job.options).count_missing_and_double(connection, job)
