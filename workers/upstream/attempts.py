"""Attempts: requests of a claim to a gateway, written down before they are made."""

from dataclasses import dataclass

from sqlalchemy import Engine

from pipeline.chunk_io.commit import while_database_is_away
from pipeline.core.chunks import Claim
from pipeline.db import attempts
from workers.watchdog import Watch


@dataclass(frozen=True, slots=True)
class Attempts:
    """Writes requests down, each on disk before it is sent. What has been paid for isn't let go because the database
    is away for a while."""

    engine: Engine
    claim: Claim
    model: str
    watch: Watch

    def begin(self, items: int, estimated_tokens: int) -> int:
        """A request is about to be made. Returns the attempt's id."""
        attempt_id = attempts.new_id()
        with self.watch.resting():
            for again in while_database_is_away("attempt_retried"):
                with again, self.engine.begin() as connection:
                    attempts.begin(
                        connection, attempt_id, self.claim, self.model, items=items, estimated_tokens=estimated_tokens
                    )
        return attempt_id

    def end(self, attempt_id: int, status: str, billed_tokens: int | None) -> None:
        """How it went. `billed_tokens`: as the gateway says; `None`: it doesn't."""
        with self.watch.resting():
            for again in while_database_is_away("attempt_retried"):
                with again, self.engine.begin() as connection:
                    attempts.end(connection, attempt_id, status, billed_tokens)
