"""Read-only queries of the dashboard, beyond a job's status.

`workspace_id` is None where a page covers every workspace.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def begin_snapshot(connection: Connection) -> None:
    """Make the transaction read-only and let it see one snapshot. This must be its first statement."""
    connection.execute(text("set transaction isolation level repeatable read, read only"))


def key_holder(connection: Connection, key_id: str) -> RowMapping | None:
    """Return the name, rights, dates and workspace of an API key: `name, admin, created_at, expires_at, workspace`."""
    rows = connection.execute(
        text("""
            select k.name, k.admin, k.created_at, k.expires_at, w.name as workspace
            from vectormill.api_keys k join vectormill.workspaces w on w.id = k.workspace_id where k.id = :key
        """),
        {"key": key_id},
    )
    return rows.mappings().one_or_none()


def workspace_of(connection: Connection, job_id: UUID) -> str:
    """Return the name of a job's workspace."""
    return connection.execute(
        text("""
            select w.name from vectormill.jobs j join vectormill.workspaces w on w.id = j.workspace_id
            where j.id = :job
        """),
        {"job": job_id},
    ).scalar_one()


def queue_positions(connection: Connection, job_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Return, for each of these jobs that is queued, the number of jobs of its model ahead of it, by priority, then by
    age."""
    rows = connection.execute(
        text("""
            select j.id, count(o.id)
            from vectormill.jobs j
            left join vectormill.jobs o on o.model_name = j.model_name and o.state in ('queued', 'running')
              and (o.priority > j.priority or (o.priority = j.priority and o.id < j.id))
            where j.id = any(:jobs) and j.state = 'queued' group by j.id
        """),
        {"jobs": list(job_ids)},
    )
    return {row[0]: row[1] for row in rows}


def throughput(connection: Connection, job_id: UUID, width_seconds: int, since: datetime) -> list[tuple[int, int, int]]:
    """Return a job's commits in each span of `width_seconds` from `since` on: (start as Unix time, items, tokens).
    Spans in which nothing was committed are left out."""
    rows = connection.execute(
        text("""
            select cast(floor(extract(epoch from created_at) / :width) as bigint) * :width as start,
                   sum(items + reused_items)::bigint, sum(prompt_tokens)::bigint
            from vectormill.usage where job_id = :job and created_at >= :since group by 1 order by 1
        """),
        {"job": job_id, "width": width_seconds, "since": since},
    )
    return [(row[0], row[1], row[2]) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Counts over consecutive chunks of a job."""

    first_chunk: int
    last_chunk: int
    chunks: int
    items: int
    pending: int
    running: int
    cancelled: int
    rejected_items: int
    #: Sum of fences: claims, and reopenings.
    claims: int
    #: Claims lost since the last progress.
    lost: int
    last_error: str | None
    #: Celery's id of the last claim's task, of a single chunk.
    task_id: str | None


def strip(connection: Connection, job_id: UUID, chunks_total: int, most_cells: int) -> list[Cell]:
    """Return a job's chunks in order, as at most `most_cells` cells of equally many chunks each."""
    rows = connection.execute(
        text("""
            select min(ordinal) as first_chunk, max(ordinal) as last_chunk, count(*) as chunks, sum(items) as items,
                   count(*) filter (where state = 'pending') as pending,
                   count(*) filter (where state = 'running') as running,
                   count(*) filter (where state = 'cancelled') as cancelled,
                   sum(rejected)::bigint as rejected_items, sum(fence)::bigint as claims,
                   sum(crashes) filter (where state in ('pending', 'running'))::bigint as lost,
                   max(last_error) as last_error, max(task_id) filter (where :size = 1) as task_id
            from vectormill.chunks where job_id = :job group by ordinal / :size order by 1
        """),
        {"job": job_id, "size": max(1, -(-chunks_total // most_cells))},
    )
    return [Cell(**{**row, "lost": row["lost"] or 0}) for row in rows.mappings()]


def at_work(connection: Connection, job_id: UUID, limit: int) -> list[RowMapping]:
    """Return chunks of a job that run now: `ordinal, items, host, name` of the worker, and `task_id`."""
    rows = connection.execute(
        text("""
            select c.ordinal, c.items - c.vacant as items, c.task_id, w.host, w.name
            -- "offset 0": by the index of leases, since few chunks run, while a job may have very many.
            from (select * from vectormill.chunks where state = 'running' and lease_until is not null offset 0) c
            left join vectormill.workers w on w.id = c.worker_id
            where c.job_id = :job order by c.ordinal limit :limit
        """),
        {"job": job_id, "limit": limit},
    )
    return list(rows.mappings())


def first_rejects(connection: Connection, job_id: UUID, codes: Sequence[str], each: int) -> list[RowMapping]:
    """Return the first `each` rejects of each code: `code, index, key, message`."""
    rows = connection.execute(
        text("""
            select r.code, r.index, r.key, r.message
            from unnest(cast(:codes as text[])) as c(code) cross join lateral (
              select code, index, key, message from vectormill.rejects
              where job_id = :job and code = c.code order by index limit :each) r
        """),
        {"job": job_id, "codes": list(codes), "each": each},
    )
    return list(rows.mappings())


def text_of(connection: Connection, job_id: UUID, index: int, most_characters: int) -> RowMapping | None:
    """Return the beginning of an item's text, while it is kept: `text, characters`; None if there is no such item."""
    rows = connection.execute(
        text("""
            select left(text, :most) as text, length(text) as characters from vectormill.items
            where job_id = :job and index = :index
        """),
        {"job": job_id, "index": index, "most": most_characters},
    )
    return rows.mappings().one_or_none()


def cost(connection: Connection, job_id: UUID) -> tuple[Decimal | None, float]:
    """Return a job's cost so far, None without a price, and the seconds that devices worked for it."""
    row = connection.execute(
        text("""
            select sum(cost), coalesce(sum(device_seconds), 0)::float8 from vectormill.usage where job_id = :job
        """),
        {"job": job_id},
    ).one()
    return row[0], row[1]


def attempts(connection: Connection, job_id: UUID) -> list[RowMapping]:
    """Return a job's requests to an upstream by status: `status, requests, items, billed_tokens`. A status of None is
    still open, or was never answered."""
    rows = connection.execute(
        text("""
            select a.status, count(*) as requests, sum(a.items)::bigint as items,
                   coalesce(sum(a.billed_tokens), 0)::bigint as billed_tokens
            from vectormill.attempts a join vectormill.chunks c on c.id = a.chunk_id
            where c.job_id = :job group by 1 order by 2 desc, 1
        """),
        {"job": job_id},
    )
    return list(rows.mappings())


def inputs(connection: Connection, job_id: UUID, limit: int) -> tuple[int, list[RowMapping]]:
    """Return the number of files that a job was read from, and the first `limit` of them: `uri, bytes, rows`."""
    total = connection.execute(
        text("select count(*) from vectormill.inputs where job_id = :job"), {"job": job_id}
    ).scalar_one()
    rows = connection.execute(
        text("""
            select uri, bytes, rows from vectormill.inputs where job_id = :job order by ordinal limit :limit
        """),
        {"job": job_id, "limit": limit},
    )
    return total, list(rows.mappings())


def busy_slots(connection: Connection) -> Mapping[UUID, int]:
    """Return the number of running chunks of each worker."""
    rows = connection.execute(
        text("select worker_id, count(*) from vectormill.chunks where state = 'running' group by worker_id")
    )
    return {row[0]: row[1] for row in rows}


def usage(
    connection: Connection, workspace_id: int | None, by: str, begin: datetime, limit: int
) -> tuple[list[RowMapping], int]:
    """Return usage since `begin`, grouped by day, model, key, job, device or workspace, largest groups first: `group,
    name, requests, items, total_tokens, cost`; and the number of groups. `name` is a key's or a job's."""
    rows = connection.execute(
        text("""
            with used as (
              select case cast(:by as text)
                       when 'day' then to_char(created_at at time zone 'UTC', 'YYYY-MM-DD')
                       when 'model' then model when 'key' then key_id when 'job' then cast(job_id as text)
                       when 'device' then device
                       else (select w.name from vectormill.workspaces w where w.id = workspace_id) end as "group",
                     count(request_id) as requests, sum(items)::bigint as items,
                     sum(total_tokens)::bigint as total_tokens, sum(cost) as cost
              from vectormill.usage
              where created_at >= :begin and (cast(:workspace as bigint) is null or workspace_id = :workspace)
              group by 1
            ), shown as (
              select *, count(*) over () as groups from used order by total_tokens desc, 1 limit :limit
            )
            select s.*, coalesce(k.name, j.name) as name
            from shown s
            left join vectormill.api_keys k on :by = 'key' and k.id = s."group"
            left join vectormill.jobs j on j.id = case when :by = 'job' then cast(s."group" as uuid) end
            order by s.total_tokens desc, 1
        """),
        {"by": by, "begin": begin, "workspace": workspace_id, "limit": limit},
    )
    found = list(rows.mappings())
    return found, found[0]["groups"] if found else 0


def reopenable(connection: Connection, job_id: UUID, codes: Sequence[str]) -> RowMapping:
    """Return the counts of what `retry` would take up: `rejects` with one of `codes`, and `chunks` that were left
    undone."""
    return (
        connection.execute(
            text("""
            select (select count(*) from vectormill.rejects where job_id = :job and code = any(:codes)) as rejects,
                   (select count(*) from vectormill.chunks where job_id = :job and cancelled > 0) as chunks
        """),
            {"job": job_id, "codes": list(codes)},
        )
        .mappings()
        .one()
    )
