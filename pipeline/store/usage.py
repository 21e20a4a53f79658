"""What was metered."""

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.jobs import Claim


def add_chunk_part(
    connection: Connection, claim: Claim, part: int, *, items: int, prompt_tokens: int, device_seconds: float
) -> None:
    """Meter one commit of a chunk. (chunk, fence, part) is unique: its presence proves that the commit happened."""
    connection.execute(
        text("""
            insert into vectormill.usage
              (workspace_id, job_id, chunk_id, fence, part, model, items, prompt_tokens, total_tokens, device_seconds,
               labels)
            select workspace_id, id, :chunk, :fence, :part, model_name, :items, :tokens, :tokens, :seconds, labels
            from vectormill.jobs where id = :job
        """),
        {
            "job": claim.job_id,
            "chunk": claim.chunk_id,
            "fence": claim.fence,
            "part": part,
            "items": items,
            "tokens": prompt_tokens,
            "seconds": device_seconds,
        },
    )


def has_chunk_part(connection: Connection, claim: Claim, part: int) -> bool:
    """Whether this commit is already there."""
    return connection.execute(
        text("""
            select exists (select from vectormill.usage where chunk_id = :chunk and fence = :fence and part = :part)
        """),
        {"chunk": claim.chunk_id, "fence": claim.fence, "part": part},
    ).scalar_one()


def recent_rates(connection: Connection, job_id: UUID, window_seconds: float) -> Mapping[str, float]:
    """Items and tokens a second that a job committed within the last `window_seconds`, or since its start if that
    is later."""
    row = connection.execute(
        text("""
            select coalesce(sum(u.items), 0) as items, coalesce(sum(u.prompt_tokens), 0) as tokens,
                   extract(epoch from coalesce(j.finished_at, now())
                     - greatest(j.started_at, coalesce(j.finished_at, now()) - make_interval(secs => :window))
                   ) as seconds
            from vectormill.jobs j
            left join vectormill.usage u on u.job_id = j.id
              and u.created_at > coalesce(j.finished_at, now()) - make_interval(secs => :window)
            where j.id = :job group by j.started_at, j.finished_at
        """),
        {"job": job_id, "window": window_seconds},
    ).one_or_none()
    if row is None or not row.seconds or row.seconds <= 0:
        return {"items_per_second": 0.0, "tokens_per_second": 0.0}
    seconds = float(row.seconds)
    return {"items_per_second": float(row.items) / seconds, "tokens_per_second": float(row.tokens) / seconds}


def measured_rates(connection: Connection, window_seconds: float, least_device_seconds: float) -> dict[str, float]:
    """Tokens per device second of each model that worked at least `least_device_seconds` in the window."""
    rows = connection.execute(
        text("""
            select model, sum(prompt_tokens) / sum(device_seconds) from vectormill.usage
            where created_at > now() - make_interval(secs => :window) and job_id is not null
            group by model having sum(device_seconds) >= :least and sum(prompt_tokens) > 0
        """),
        {"window": window_seconds, "least": least_device_seconds},
    )
    return {model: float(rate) for model, rate in rows}
