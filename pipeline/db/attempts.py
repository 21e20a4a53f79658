"""Attempts: requests to upstreams, recorded before they are sent, since a provider may bill them."""

import secrets
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.chunks import Claim


def new_id() -> int:
    """Return the id of an attempt that isn't recorded yet."""
    return secrets.randbits(63)


def begin(
    connection: Connection, attempt_id: int, claim: Claim, model: str, *, items: int, estimated_tokens: int
) -> None:
    """Record an attempt before its request is sent. Idempotent: a repeat, after a commit whose outcome was lost,
    changes nothing."""
    connection.execute(
        text("""
            insert into vectormill.attempts (id, chunk_id, fence, model, items, estimated_tokens, started_at)
            overriding system value
            values (:id, :chunk, :fence, :model, :items, :tokens, clock_timestamp()) on conflict (id) do nothing
        """),
        {
            "id": attempt_id,
            "chunk": claim.chunk_id,
            "fence": claim.fence,
            "model": model,
            "items": items,
            "tokens": estimated_tokens,
        },
    )


def end(connection: Connection, attempt_id: int, status: str, billed_tokens: int | None) -> None:
    """Record an attempt's outcome. `billed_tokens` is what the upstream reports; `None`: it reported nothing, and may
    have billed."""
    connection.execute(
        text("""
            update vectormill.attempts
            set status = :status, billed_tokens = :billed, finished_at = clock_timestamp() where id = :id
        """),
        {"id": attempt_id, "status": status, "billed": billed_tokens},
    )


@dataclass(frozen=True, slots=True)
class Billed:
    """Tokens that upstreams billed for a job's requests."""

    #: As reported by upstreams.
    tokens: int
    #: Estimate for requests whose bill no reply reports.
    unanswered: int


def billed(connection: Connection, job_id: UUID) -> Billed | None:
    """Return the tokens billed for a job's requests to an upstream; `None` if it made none."""
    tokens, unanswered, requests = connection.execute(
        text("""
            select coalesce(sum(a.billed_tokens), 0)::bigint,
                   coalesce(sum(a.estimated_tokens) filter (where a.billed_tokens is null), 0)::bigint, count(*)
            from vectormill.attempts a join vectormill.chunks c on c.id = a.chunk_id where c.job_id = :job
        """),
        {"job": job_id},
    ).one()
    return Billed(tokens, unanswered) if requests else None
