"""Usage: tokens metered per gateway request and per commit of a chunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from pipeline.core.chunks import Claim


def add_chunk_part(
    connection: Connection,
    claim: Claim,
    part: int,
    *,
    items: int,
    prompt_tokens: int,
    reused_items: int,
    reused_tokens: int,
    truncated: int,
    device_seconds: float,
    device: str | None,
    precision: str | None,
    roofline_seconds: float,
) -> None:
    """Meter one commit of a chunk. (chunk, fence, part) is unique, and a row with the claim's token proves that the
    commit happened."""
    connection.execute(
        text("""
            insert into vectormill.usage
              (workspace_id, job_id, chunk_id, fence, token, part, model, items, prompt_tokens, total_tokens,
               reused_items, reused_tokens, truncated, device_seconds, device, precision, roofline_seconds, cost,
               labels)
            select j.workspace_id, j.id, :chunk, :fence, :token, :part, j.model_name, :items, :tokens, :tokens,
                   :reused_items, :reused_tokens, :truncated, :seconds, :device, :precision, nullif(:roofline, 0),
                   m.price_per_million * :tokens / 1000000, j.labels
            from vectormill.jobs j left join vectormill.models m on m.name = j.model_name where j.id = :job
        """),
        {
            "job": claim.job_id,
            "chunk": claim.chunk_id,
            "fence": claim.fence,
            "token": claim.token,
            "part": part,
            "items": items,
            "tokens": prompt_tokens,
            "reused_items": reused_items,
            "reused_tokens": reused_tokens,
            "truncated": truncated,
            "seconds": device_seconds,
            "device": device,
            "precision": precision,
            "roofline": roofline_seconds,
        },
    )


def has_chunk_part(connection: Connection, claim: Claim, part: int) -> bool:
    """Return True if this commit is recorded already."""
    return connection.execute(
        text("""
            select exists (select from vectormill.usage
                           where chunk_id = :chunk and fence = :fence and part = :part and token = :token)
        """),
        {"chunk": claim.chunk_id, "fence": claim.fence, "part": part, "token": claim.token},
    ).scalar_one()


def devices_of_job(connection: Connection, job_id: UUID) -> list[RowMapping]:
    """Return the kinds of devices that embedded a job's items, most items first: `device, precision, items, tokens`."""
    rows = connection.execute(
        text("""
            select device, precision, cast(sum(items) as bigint) as items, cast(sum(prompt_tokens) as bigint) as tokens
            from vectormill.usage where job_id = :job and device is not null
            group by device, precision having sum(items) > 0 order by items desc, device, precision
        """),
        {"job": job_id},
    )
    return list(rows.mappings())


class RecentRates(NamedTuple):
    """Rates of a job."""

    items_per_second: float
    tokens_per_second: float
    #: Share of the devices' rate of matrix products; `None`: there is none.
    roofline: float | None


def recent_rates(connection: Connection, job_id: UUID, window_seconds: float) -> RecentRates:
    """Return the items and tokens per second that a job committed within the last `window_seconds`, or since its start
    if that is later, and their share of the roofline. For a job that has ended, the window ends with it."""
    row = connection.execute(
        text("""
            select coalesce(sum(u.items + u.reused_items), 0) as items, coalesce(sum(u.prompt_tokens), 0) as tokens,
                   sum(u.roofline_seconds)
                     / nullif(sum(u.device_seconds) filter (where u.roofline_seconds is not null), 0) as roofline,
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
        return RecentRates(0.0, 0.0, None)
    seconds = float(row.seconds)
    return RecentRates(float(row.items) / seconds, float(row.tokens) / seconds, row.roofline)


def measured_rates(connection: Connection, window_seconds: float, least_device_seconds: float) -> list[RowMapping]:
    """Return the tokens per device second of each model on each kind of device and in each precision that worked at
    least `least_device_seconds` in the window: `model, device, precision, rate, last_at`. Recent work weighs most."""
    rows = connection.execute(
        text("""
            -- Per model, to use the index.
            select m.name as model, of.device, of.precision, of.tokens / of.weighted_seconds as rate, of.last_at
            from vectormill.models m cross join lateral (
              select device, precision, sum(prompt_tokens * weight) as tokens,
                     sum(device_seconds * weight) as weighted_seconds,
                     sum(device_seconds) as seconds, max(created_at) as last_at
              from vectormill.usage
              -- Weight falls to about a third after five minutes.
              cross join lateral (
                select exp(-cast(extract(epoch from now() - created_at) as double precision) / 300) as weight
              ) age
              where model = m.name and created_at > now() - make_interval(secs => :window) and job_id is not null
              group by device, precision
            ) of
            where of.seconds >= :least and of.tokens > 0
        """),
        {"window": window_seconds, "least": least_device_seconds},
    )
    return list(rows.mappings())


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """Work of slots on some chunks of a model, weighted by age: a chunk that ended five minutes before the newest one
    counts for a third."""

    chunks: float
    #: Of whole items, or of passages.
    vectors: float
    tokens: float
    device_seconds: float
    #: From claim to last commit.
    slot_seconds: float


def recent_chunks(connection: Connection, model: str, *, parquet: bool, window_seconds: float) -> ChunkWork:
    """Return the work on a model's newest chunks within the window that were claimed once and are done, of jobs whose
    vectors go to Parquet or of those whose vectors go to Postgres."""
    row = connection.execute(
        text("""
            with newest as (
              select chunk_id from vectormill.usage
              where model = :model and created_at > now() - make_interval(secs => :window) and chunk_id is not null
              order by created_at desc limit 2000
            )
            select sum(weight), sum(vectors * weight), sum(tokens * weight), sum(device_seconds * weight),
                   sum(slot_seconds * weight)
            from (
              select u.*, extract(epoch from c.finished_at - c.started_at)::float8 as slot_seconds,
                     exp(extract(epoch from c.finished_at - max(c.finished_at) over ())::float8 / 300) as weight
              from vectormill.chunks c
              join vectormill.jobs j on j.id = c.job_id and (j.options ->> 'output' is not null) = :parquet
              cross join lateral (
                select case when c.passages > 0 then c.passages else sum(items + reused_items) end::float8 as vectors,
                       sum(prompt_tokens)::float8 as tokens,
                       sum(device_seconds) as device_seconds
                from vectormill.usage where chunk_id = c.id and fence = 1
              ) u
              where c.id in (select chunk_id from newest) and c.fence = 1 and c.state = 'done'
            ) chunks
        """),
        {"model": model, "parquet": parquet, "window": window_seconds},
    ).one()
    return ChunkWork(*(value or 0.0 for value in row))


def add_requests(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Meter requests to the gateway. Rows that exist already are skipped."""
    connection.execute(
        text("""
            insert into vectormill.usage
              (workspace_id, key_id, request_id, model, items, prompt_tokens, total_tokens, truncated, end_user, cost,
               device_seconds, created_at)
            values (:workspace_id, :key_id, :request_id, :model, :items, :tokens, :tokens, :truncated, :end_user,
                    :price_per_million * :tokens / 1000000, 0, :created_at)
            on conflict (request_id) where request_id is not null do nothing
        """),
        list(rows),
    )


def this_month(connection: Connection, workspace_id: int) -> tuple[int, Decimal]:
    """Return a workspace's tokens and cost since the start of the month (UTC)."""
    tokens, cost = connection.execute(
        text("""
            select coalesce(sum(total_tokens), 0), coalesce(sum(cost), 0) from vectormill.usage
            where workspace_id = :workspace and created_at >= date_trunc('month', now(), 'UTC')
        """),
        {"workspace": workspace_id},
    ).one()
    return int(tokens), cost


def grouped(
    connection: Connection, workspace_id: int, by: str, *, label: str | None, begin: datetime, end: datetime
) -> list[RowMapping]:
    """Return a workspace's usage from `begin` to before `end`, grouped by day (UTC), model, key, job, device,
    precision, or a label's value: `group, requests, items, prompt_tokens, total_tokens, reused_tokens, truncated,
    cost`."""
    rows = connection.execute(
        text("""
            select case :by when 'day' then to_char(created_at at time zone 'UTC', 'YYYY-MM-DD')
                            when 'model' then model when 'key' then key_id when 'job' then cast(job_id as text)
                            when 'device' then device when 'precision' then precision
                            else labels ->> cast(:label as text) end as "group",
                   count(request_id) as requests, sum(items) as items, sum(prompt_tokens) as prompt_tokens,
                   sum(total_tokens) as total_tokens, sum(reused_tokens) as reused_tokens,
                   sum(truncated) as truncated, coalesce(sum(cost), 0) as cost
            from vectormill.usage
            where workspace_id = :workspace and created_at >= :begin and created_at < :end
            group by 1 order by 1 nulls last
        """),
        {"workspace": workspace_id, "by": by, "label": label, "begin": begin, "end": end},
    )
    return list(rows.mappings())
