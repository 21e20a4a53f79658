"""Verification of a receipt: what a job wrote, counted row by row against what its chunks say."""

from uuid import UUID

from sqlalchemy import Connection

from pipeline.chunk_io.sinks import sink_of
from pipeline.core.job_status import Receipt
from pipeline.core.jobs import Job
from pipeline.jobs import status


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
    return sink_of(job.options).count_missing_and_double(connection, job)
