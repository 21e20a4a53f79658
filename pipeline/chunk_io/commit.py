"""Commit of a chunk: the one transaction that writes vectors, rejects, usage and the chunk's state exactly once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import tenacity
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.sinks import Sink, sink_of
from pipeline.core.chunks import MOST_TRUNCATED, ChunkState, Claim, Reject, RejectCode
from pipeline.core.errors import LeaseLost
from pipeline.core.job_status import TruncatedItem
from pipeline.core.options import VectorType
from pipeline.core.vectors import restored, sound, stored
from pipeline.db import chunks, embeddings, items, outputs, usage
from pipeline.db.database import flush_later, is_connection_lost

log = structlog.get_logger()

#: Time for which a finished part is retried while the database is away, before its worker drops it.
_PATIENCE_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Data of one commit of a chunk, complete before the transaction opens."""

    #: Embedded by this claim.
    rows: embeddings.EmbeddedRows
    #: Copies of vectors of items with the same text.
    copies: embeddings.EmbeddedRows = embeddings.NO_ROWS
    rejects: Sequence[Reject] = ()
    #: Wall time of the forward passes.
    device_seconds: float = 0.0
    #: Kind of the device, and its precision; `None`: an upstream made the vectors, or there are none.
    device: str | None = None
    precision: str | None = None
    #: Time that the forward passes would take at the device's rate of matrix products; 0 if there is none.
    roofline_seconds: float = 0.0

    @property
    def settled(self) -> int:
        """Number of items that get their vectors or reject in this part."""
        return self.rows.items + self.copies.items + len(self.rejects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """State of the chunk after a commit."""

    #: `PENDING`: given back, or cancelled if its job is being cancelled.
    state: ChunkState
    isolation: int = 0
    not_before_seconds: float = 0
    error: str | None = None


def split_bad_vectors(
    rows: embeddings.EmbeddedRows, dimensions: int, kept_as: VectorType
) -> tuple[embeddings.EmbeddedRows, list[Reject]]:
    """Separate vectors that must never be written, as rejects: those that are not finite (as stored) or zero. An item
    with such a passage is rejected as a whole.

    Raises:
        ValueError: the vectors don't have `dimensions` elements each, which is an error of ours.
    """
    if not len(rows.indexes):
        return rows, []
    if rows.vectors.shape != (len(rows.indexes), dimensions):
        raise ValueError(f"vectors of shape {rows.vectors.shape} for {len(rows.indexes)} × {dimensions}")
    good = sound(restored(stored(rows.vectors, kept_as)))
    if good.all():
        return rows, []
    message = "the model made a vector that is zero or not finite"
    rejects = {
        int(rows.indexes[at]): Reject(
            index=int(rows.indexes[at]),
            key=rows.keys[at],
            code=RejectCode.BAD_VECTOR,
            message=f"{rows.passage_named(at)}{message}",
        )
        for at in np.flatnonzero(~good)[::-1].tolist()  # of an item's bad passages the first one is named
    }
    return rows.select(~np.isin(rows.indexes, list(rejects))), [rejects[index] for index in sorted(rejects)]


def _most_truncated(rows: embeddings.EmbeddedRows) -> list[TruncatedItem]:
    """Return the items that lost the most tokens to truncation."""
    most = np.argsort(-rows.lost_tokens, kind="stable")[:MOST_TRUNCATED]
    return [
        TruncatedItem(index=int(rows.indexes[at]), key=rows.keys[at], lost_tokens=int(rows.lost_tokens[at]))
        for at in most.tolist()
        if rows.lost_tokens[at]
    ]


def write_chunk(engine: Engine, claim: Claim, number: int, part: Commit, ending: Ending) -> None:
    """Commit part `number` of a claim: fenced update, vectors, rejects and usage, in one transaction.

    If a sink keeps vectors in files, the file is written before, and the transaction records it.

    If the connection is lost, even during COMMIT, the commit is retried on a new connection, which first checks if the
    lost one had succeeded; nothing is guessed.

    Raises:
        LeaseLost: the chunk belongs to another claim, or has been cancelled, or the database has lost an earlier part
            of this claim; nothing was written.
        ValueError: a vector is zero, not finite or of the wrong size; nothing was written.
        StorageRefused, StorageUnreachable: the Parquet file can't be written; nothing was.
        sqlalchemy.exc.DBAPIError: the database refuses, or stayed away for ten minutes.
    """
    rows = part.rows.joined(part.copies)
    _, bad = split_bad_vectors(rows, claim.dimensions, claim.options.dtype)
    if bad:
        raise ValueError(f"{len(bad)} vectors are zero or not finite")
    sink = sink_of(claim.options)
    staged = sink.stage(claim, number, rows)
    for attempt in while_database_is_away("commit_retried"):
        with attempt, engine.connect() as connection:
            _show_backend(connection, claim)
            # A retry may meet its own earlier commit.
            again = attempt.retry_state.attempt_number > 1
            with connection.begin() as transaction:
                if ending.state is not ChunkState.RUNNING:
                    # A server that crashes may lose this commit; the chunk is then still running, and is done again
                    # (docs/explanation/decisions/0003). Commits that a claim builds on must be on disk.
                    flush_later(connection)
                if not _commit(connection, claim, number, part, rows, ending, sink, staged, again=again):
                    transaction.rollback()


def while_database_is_away(event: str) -> tenacity.Retrying:
    """Return a retry policy for lost connections: exponential backoff for ten minutes; each retry logs `event`."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and is_connection_lost(error)),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_after_delay(_PATIENCE_SECONDS),
        before_sleep=lambda state: log.warning(event, attempt=state.attempt_number),
        reraise=True,
    )


def _show_backend(connection: Connection, claim: Claim) -> None:
    """Record which backend commits, for the sweep, as another one may have claimed; and renew the lease.

    The commit begins with a whole lease, since no renewal reaches the chunk while the transaction holds its row.
    """
    with connection.begin():
        flush_later(connection)
        chunks.renew(connection, claim, committing=True)


def _commit(
    connection: Connection,
    claim: Claim,
    number: int,
    part: Commit,
    rows: embeddings.EmbeddedRows,
    ending: Ending,
    sink: Sink,
    staged: outputs.Staged | None,
    *,
    again: bool,
) -> bool:
    """Write everything within the caller's transaction. Return False if an earlier try of this part had succeeded."""
    tokens, reused_tokens = int(part.rows.tokens.sum()), int(part.copies.tokens.sum())
    ours = chunks.record(
        connection,
        claim,
        chunks.Progress(
            state=ending.state,
            embedded=part.rows.items,
            reused=part.copies.items,
            rejected=len(part.rejects),
            truncated=int(rows.truncated.sum()),
            prompt_tokens=tokens,
            reused_tokens=reused_tokens,
            passages=0 if rows.passages is None else len(rows.indexes),
            lost_tokens=int(rows.lost_tokens.sum()),
            most_truncated=_most_truncated(rows),
            isolation=ending.isolation,
            not_before_seconds=ending.not_before_seconds,
            output_uri=staged.uri if staged else None,
            error=ending.error,
        ),
        number=number,
    )
    # The update has waited for any earlier try that was still in progress, so its outcome is known now.
    if again and usage.has_chunk_part(connection, claim, number):
        return False
    if not ours:
        raise LeaseLost
    if len(rows.indexes):
        sink.write(connection, claim, rows, staged)
    items.copy_rejects(connection, claim.job_id, part.rejects)
    usage.add_chunk_part(
        connection,
        claim,
        number,
        items=part.rows.items,
        prompt_tokens=tokens,
        reused_items=part.copies.items,
        reused_tokens=reused_tokens,
        truncated=int(rows.truncated.sum()),
        device_seconds=part.device_seconds,
        device=part.device,
        precision=part.precision,
        roofline_seconds=part.roofline_seconds,
    )
    return True
