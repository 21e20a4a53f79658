"""Attempts: requests of a claim to an upstream, recorded in Postgres before they are sent."""

from dataclasses import dataclass

from sqlalchemy import Engine

from pipeline.chunk_io.commit import while_database_is_away
from pipeline.core.chunks import Claim
from pipeline.db import attempts
from workers.watchdog import Watch


@dataclass(frozen=True, slots=True)
class Attempts:
    """Recorder of a claim's requests, each on disk (a synchronous commit) before it is sent.

    It retries while the database is away, so that results already paid for aren't lost.
    """

    engine: Engine
    claim: Claim
    model: str
    watch: Watch

    def begin(self, items: int, estimated_tokens: int) -> int:
        """Record a request that is about to be sent. Return the attempt's id."""
        attempt_id = attempts.new_id()
        with self.watch.resting():
            for again in while_database_is_away("attempt_retried"):
                with again, self.engine.begin() as connection:
                    attempts.begin(
                        connection, attempt_id, self.claim, self.model, items=items, estimated_tokens=estimated_tokens
                    )
        return attempt_id

    def end(self, attempt_id: int, status: str, billed_tokens: int | None) -> None:
        """Record an attempt's outcome. `billed_tokens` is the upstream's count, or `None` if it gives none."""
        with self.watch.resting():
            for again in while_database_is_away("attempt_retried"):
                with again, self.engine.begin() as connection:
                    attempts.end(connection, attempt_id, status, billed_tokens)
