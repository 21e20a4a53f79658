"""Chunks: claims, leases, fences, and the counts that every status sums up.

States stand in the SQL as literals, so that the planner can prove that a partial index applies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import orjson
from sqlalchemy import Connection, RowMapping, insert, select, text

from pipeline.core.chunks import (
    MOST_TRUNCATED,
    Chunk,
    ChunkState,
    Claim,
    Extent,
    ParquetExtent,
    TextExtent,
)
from pipeline.core.job_status import TruncatedItem
from pipeline.core.jobs import JobState
from pipeline.core.options import KeptOptions
from pipeline.db.tables import chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class NewChunk:
    """Planned range of a job's items."""

    ordinal: int
    first_index: int
    items: int
    estimated_tokens: int
    #: Items that were rejected when they were read.
    rejected: int = 0
    #: Places of rows of its file that are no items of the job.
    vacant: int = 0
    #: Input file that holds its rows, and their extent in it; `None`: they are in Postgres.
    input_ordinal: int | None = None
    extent: Extent | None = None

    def row(self, job_id: UUID) -> dict[str, Any]:
        """Return the columns of the chunk's row."""
        extent = self.extent
        return {
            "job_id": job_id,
            "ordinal": self.ordinal,
            "first_index": self.first_index,
            "items": self.items,
            "estimated_tokens": self.estimated_tokens,
            "rejected": self.rejected,
            "vacant": self.vacant,
            "state": ChunkState.DONE if self.rejected + self.vacant == self.items else ChunkState.PENDING,
            "input_ordinal": self.input_ordinal,
            "row_group": extent.row_group if isinstance(extent, ParquetExtent) else None,
            "input_offset": extent and extent.offset,
            "input_bytes": extent.length if isinstance(extent, TextExtent) else None,
            "input_line": extent and extent.line,
        }


def insert_chunks(connection: Connection, job_id: UUID, planned: Sequence[NewChunk]) -> None:
    """Insert planned chunks. A chunk without an item to embed is done at once."""
    if planned:
        connection.execute(insert(chunks), [chunk.row(job_id) for chunk in planned])


def claim(
    connection: Connection,
    job_id: UUID,
    chunk_id: int,
    *,
    worker_id: UUID,
    task_id: str,
    lease_seconds: float,
) -> Claim | None:
    """Claim a pending chunk of a runnable job: state running, fence + 1, a new token, a lease. Return None if it can't
    be claimed."""
    row = (
        connection.execute(
            text("""
            with claimed as (
              update vectormill.chunks c
              set state = 'running', fence = c.fence + 1, token = :token, parts = 0, backend_pid = pg_backend_pid(),
                  lease_until = clock_timestamp() + make_interval(secs => :lease),
                  worker_id = :worker, task_id = :task, started_at = coalesce(c.started_at, clock_timestamp())
              from vectormill.jobs j
              where c.id = :chunk and c.state = 'pending' and (c.not_before is null or c.not_before <= now())
                and j.id = c.job_id and j.id = :job and j.state in ('queued', 'running')
              returning c.*, j.workspace_id, j.vector_space_id, j.model_name, j.options
            ), started as (
              update vectormill.jobs set state = 'running', started_at = coalesce(started_at, clock_timestamp())
              where id = :job and state = 'queued' and exists (select from claimed)
            )
            select c.*, s.dimensions, s.max_item_tokens, i.uri, i.etag, i.bytes as file_bytes
            from claimed c join vectormill.vector_spaces s on s.id = c.vector_space_id
            left join vectormill.inputs i on i.job_id = c.job_id and i.ordinal = c.input_ordinal
        """),
            {
                "chunk": chunk_id,
                "job": job_id,
                "token": new_token(),
                "worker": worker_id,
                "task": task_id,
                "lease": lease_seconds,
            },
        )
        .mappings()
        .one_or_none()
    )
    return _as_claim(row, lease_seconds) if row else None


def new_token() -> UUID:
    """Return a new claim token. A fence is unique on one timeline of Postgres only: a server that has lost its last
    commits, to a failover or a restore, gives it again."""
    return uuid4()


def _as_claim(row: RowMapping, lease_seconds: float) -> Claim:
    return Claim(
        job_id=row["job_id"],
        chunk_id=row["id"],
        fence=row["fence"],
        token=row["token"],
        worker_id=row["worker_id"],
        backend_pid=row["backend_pid"],
        first_index=row["first_index"],
        items=row["items"],
        isolation=row["isolation"],
        model=row["model_name"],
        vector_space_id=row["vector_space_id"],
        dimensions=row["dimensions"],
        max_item_tokens=row["max_item_tokens"],
        lease_seconds=lease_seconds,
        extent=_as_extent(row) if row["input_ordinal"] is not None else None,
        options=KeptOptions.from_json(row["options"]),
    )


def _as_extent(row: RowMapping) -> Extent:
    same = {"uri": row["uri"], "etag": row["etag"], "bytes": row["file_bytes"], "line": row["input_line"]}
    if row["row_group"] is not None:
        return ParquetExtent(**same, row_group=row["row_group"], offset=row["input_offset"])
    return TextExtent(**same, offset=row["input_offset"], length=row["input_bytes"])


def renew(connection: Connection, claim: Claim, *, committing: bool = False) -> JobState | None:
    """Renew a claim's lease, even one that the sweep has given back, while nobody else has claimed the chunk.

    `committing`: this connection's backend will commit for the claim, and is the one to terminate if it freezes. Until
    its transaction ends, its application name says for which claim it writes.

    Return the job's state, from which a worker learns of a cancellation; None if the chunk belongs to another claim.
    """
    state = connection.execute(
        text("""
            update vectormill.chunks c
            set state = 'running', lease_until = clock_timestamp() + make_interval(secs => :lease),
                -- Undo the crash that the sweep counted.
                crashes = greatest(0, c.crashes - (c.state = 'pending')::int),
                isolation = greatest(0, c.isolation - (c.state = 'pending')::int),
                backend_pid = case when :committing then pg_backend_pid() else c.backend_pid end
            from vectormill.jobs j
            where c.id = :chunk and c.fence = :fence and c.token = :token and c.worker_id = :worker
              and c.state in ('running', 'pending') and j.id = c.job_id
            returning j.state, case when :committing then
              set_config('application_name', 'vectormill-worker ' || replace(c.token::text, '-', ''), true) end
        """),
        {
            "chunk": claim.chunk_id,
            "fence": claim.fence,
            "token": claim.token,
            "worker": claim.worker_id,
            "lease": claim.lease_seconds,
            "committing": committing,
        },
    ).scalar()
    return JobState(state) if state else None


def most_truncated(connection: Connection, job_id: UUID) -> list[TruncatedItem]:
    """Return a job's truncated items that lost the most tokens."""
    # They are in the chunks whose first ones lost the most; others needn't be unfolded.
    rows = connection.execute(
        text("""
            select (one->>'index')::bigint as index, one->>'key' as key, (one->>'lost_tokens')::bigint as lost_tokens
            from (select most_truncated from vectormill.chunks where job_id = :job and lost_tokens > 0
                  order by (most_truncated->0->>'lost_tokens')::bigint desc, first_index limit :shown) c,
                 jsonb_array_elements(most_truncated) one
            order by lost_tokens desc, index limit :shown
        """),
        {"job": job_id, "shown": MOST_TRUNCATED},
    )
    return [TruncatedItem(**row) for row in rows.mappings()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counts that one commit adds to a chunk, and the chunk's state after it."""

    #: `PENDING`: given back, or cancelled if its job is being cancelled.
    state: ChunkState
    embedded: int = 0
    #: Items that got a copy of another item's vector, and the tokens of their texts.
    reused: int = 0
    reused_tokens: int = 0
    rejected: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    #: Vectors, where items have several.
    passages: int = 0
    lost_tokens: int = 0
    #: Truncated items that lost the most tokens.
    most_truncated: Sequence[TruncatedItem] = ()
    #: Isolation level from here on; `None` keeps the level that the last commit recorded.
    isolation: int | None = 0
    #: Seconds from now before which a chunk given back can't be claimed.
    not_before_seconds: float = 0
    #: Location of the Parquet part that this commit adds.
    output_uri: str | None = None
    error: str | None = None


#: Fence check: it keeps a worker that has lost its claim from writing after another has taken over.
OURS = "fence = :fence and token = :token and state in ('running', 'pending')"
_RECORD = """
    with job as (
      select case when :state = 'pending' and state = 'cancelling' then 'cancelled' else :state end as after
      from vectormill.jobs where id = :job
    )
    update vectormill.chunks set
      state = after, parts = parts + 1,
      embedded = embedded + :embedded, reused = reused + :reused, rejected = rejected + :rejected,
      reused_tokens = reused_tokens + :reused_tokens,
      truncated = truncated + :truncated, prompt_tokens = prompt_tokens + :tokens,
      passages = passages + :passages, lost_tokens = lost_tokens + :lost,
      most_truncated = case when cast(:most_truncated as jsonb) = '[]' then most_truncated else (
        select jsonb_agg(one) from (
          select one from jsonb_array_elements(most_truncated || cast(:most_truncated as jsonb)) one
          order by (one->>'lost_tokens')::bigint desc, (one->>'index')::bigint limit :shown) most) end,
      cancelled = case when after = 'cancelled'
                  then items - vacant - embedded - :embedded - reused - :reused - rejected - :rejected
                  else cancelled end,
      crashes = case when :embedded + :reused + :rejected > 0 then 0 else crashes end,
      isolation = coalesce(:isolation, isolation),
      lease_until = case when after = 'running'
                    then clock_timestamp() + make_interval(secs => :lease) end,
      not_before = case when after = 'pending' and cast(:not_before as float8) > 0
                   then clock_timestamp() + make_interval(secs => :not_before) end,
      worker_id = case when after = 'pending' then null else worker_id end,
      last_error = coalesce(:error, last_error),
      output_uri = coalesce(:output, output_uri),
      finished_at = case when after in ('done', 'cancelled') then clock_timestamp() end
    from job
    where id = :chunk and (cast(:number as integer) is null or parts = :number) and {ours}
    returning set_config('application_name', 'vectormill-worker ' || replace(cast(:token as text), '-', ''), true)
"""


def record(connection: Connection, claim: Claim, progress: Progress, *, number: int | None = None) -> bool:
    """Apply the fenced update at the head of every commit. Return False if the chunk no longer belongs to this claim,
    or isn't where the claim left it.

    `number`: the number of this claim's commits that the chunk must have seen. A failover may have lost some of them,
    and their items must be embedded again. A chunk that ends `cancelled` counts its remaining items as cancelled. A
    chunk that is given back forgets its worker, so that a late renewal can't take it again. Until the transaction ends,
    the backend's application name says for which claim it writes.
    """
    return (
        connection.execute(
            text(_RECORD.format(ours=OURS)),
            {
                "chunk": claim.chunk_id,
                "job": claim.job_id,
                "number": number,
                "fence": claim.fence,
                "token": claim.token,
                "state": progress.state.value,
                "embedded": progress.embedded,
                "reused": progress.reused,
                "reused_tokens": progress.reused_tokens,
                "rejected": progress.rejected,
                "truncated": progress.truncated,
                "tokens": progress.prompt_tokens,
                "passages": progress.passages,
                "lost": progress.lost_tokens,
                "most_truncated": orjson.dumps([each.model_dump() for each in progress.most_truncated]).decode(),
                "shown": MOST_TRUNCATED,
                "isolation": progress.isolation,
                "lease": claim.lease_seconds,
                "not_before": progress.not_before_seconds,
                "error": progress.error,
                "output": progress.output_uri,
            },
        ).first()
        is not None
    )


def pending_after(connection: Connection, job_id: UUID, after: int, limit: int) -> Sequence[tuple[int, int]]:
    """Return the next claimable chunks of a job past id `after`: (id, estimated tokens)."""
    # `between`, here and below: with `=`, the planner could take the order from the primary key. While statistics are
    # from before the job ran, it does, and reads past all chunks that have ended.
    rows = connection.execute(
        text("""
            select id, estimated_tokens from vectormill.chunks
            where job_id between :job and :job and state = 'pending' and id > :after
              and (not_before is null or not_before <= now())
            order by job_id, id limit :limit
        """),
        {"job": job_id, "after": after, "limit": limit},
    )
    return [(row[0], row[1]) for row in rows]


class Place(NamedTuple):
    """Place of a chunk in its job."""

    #: Position, from 0, the number of the job's chunks, and that of the chunk's items.
    ordinal: int
    chunks: int
    items: int


def places(connection: Connection, chunk_ids: Sequence[int]) -> dict[int, Place]:
    """Return the places of some chunks."""
    if not chunk_ids:
        return {}
    rows = connection.execute(
        text("""
            select c.id, c.ordinal, last.ordinal + 1, c.items - c.vacant
            from vectormill.chunks c
            cross join lateral (select ordinal from vectormill.chunks l where l.job_id = c.job_id
                                order by first_index desc limit 1) last
            where c.id = any(:ids)
        """),
        {"ids": list(chunk_ids)},
    )
    return {row[0]: Place(*row[1:]) for row in rows}


def cancel_pending(connection: Connection, job_id: UUID, after: int, limit: int) -> list[int]:
    """Cancel up to `limit` pending chunks of a job past id `after`. Committed items stay. Return the chunks' ids."""
    rows = connection.execute(
        text("""
            update vectormill.chunks
            set state = 'cancelled', cancelled = items - vacant - embedded - reused - rejected,
                finished_at = clock_timestamp()
            -- By place: a join would read the whole table for each batch.
            where ctid = any(array(select ctid from vectormill.chunks
                                   where job_id between :job and :job and state = 'pending' and id > :after
                                   order by job_id, id limit :limit for update skip locked))
            returning id
        """),
        {"job": job_id, "after": after, "limit": limit},
    )
    return list(rows.scalars())


def page(connection: Connection, job_id: UUID, *, states: Sequence[ChunkState], after: int, limit: int) -> list[Chunk]:
    """Return a page of a job's chunks in order, past the one that begins at index `after`; only those in `states`, if
    given."""
    found = select(*(chunks.c[each.name] for each in fields(Chunk))).where(chunks.c.job_id == job_id)
    if states:
        found = found.where(chunks.c.state.in_(states))
    found = found.where(chunks.c.first_index > after).order_by(chunks.c.first_index).limit(limit)
    return [Chunk(**{**row, "state": ChunkState(row["state"])}) for row in connection.execute(found).mappings()]


def delete_some(connection: Connection, job_id: UUID, limit: int) -> int:
    """Delete up to `limit` chunks of a job, with their recorded outputs and attempts. Return the number of chunks."""
    return connection.execute(
        text("""
            with gone as (
              delete from vectormill.chunks
              where ctid = any(array(select ctid from vectormill.chunks where job_id = :job limit :limit))
              returning id
            ), parts as (
              delete from vectormill.outputs where job_id = :job and chunk_id in (select id from gone)
            ), tried as (
              delete from vectormill.attempts where chunk_id in (select id from gone)
            )
            select count(*) from gone
        """),
        {"job": job_id, "limit": limit},
    ).scalar_one()


def has_open(connection: Connection, job_id: UUID) -> bool:
    """Return True if a chunk of the job is pending or running."""
    # Not by `exists`: for that, the planner prefers to scan the table until it meets one.
    first = connection.execute(
        text("""
            select id from vectormill.chunks where job_id between :job and :job and state in ('pending', 'running')
            order by job_id, id limit 1
        """),
        {"job": job_id},
    )
    return first.first() is not None


def forgotten(connection: Connection, job_id: UUID) -> tuple[int, int, int]:
    """Return the numbers of a job's items that were erased, and of vectors and rejects among them."""
    found = text("""
        select coalesce(sum(forgotten), 0)::bigint, coalesce(sum(forgotten_vectors), 0)::bigint,
               coalesce(sum(forgotten_rejects), 0)::bigint
        from vectormill.chunks where job_id = :job
    """)
    items, vectors, gone = connection.execute(found, {"job": job_id}).one()
    return items, vectors, gone


def sums(connection: Connection, job_id: UUID) -> RowMapping:
    """Return a job's counts, summed over its chunks."""
    return (
        connection.execute(
            text("""
            select coalesce(sum(items), 0)::bigint as items, coalesce(sum(embedded), 0)::bigint as embedded,
                   coalesce(sum(reused), 0)::bigint as reused, coalesce(sum(rejected), 0)::bigint as rejected,
                   coalesce(sum(cancelled), 0)::bigint as cancelled,
                   coalesce(sum(truncated), 0)::bigint as truncated,
                   coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
                   coalesce(sum(reused_tokens), 0)::bigint as reused_tokens,
                   coalesce(sum(passages), 0)::bigint as passages,
                   coalesce(sum(lost_tokens), 0)::bigint as lost_tokens,
                   coalesce(sum(vacant), 0)::bigint as vacant,
                   coalesce(sum(forgotten), 0)::bigint as forgotten,
                   count(*) filter (where state = 'pending') as pending_chunks,
                   count(*) filter (where state = 'running') as running_chunks,
                   count(*) filter (where state = 'done') as done_chunks,
                   count(*) filter (where state = 'cancelled') as cancelled_chunks
            from vectormill.chunks where job_id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one()
    )


@dataclass(frozen=True, slots=True)
class InFlight:
    """Estimated tokens of a job's running chunks."""

    job_id: UUID
    model: str
    workspace_id: int
    tokens: int


def tokens_in_flight(connection: Connection) -> list[InFlight]:
    """Return the tokens in flight of each job that has running chunks."""
    rows = connection.execute(
        text("""
            select j.id, j.model_name, j.workspace_id, sum(c.estimated_tokens)::bigint
            from vectormill.chunks c join vectormill.jobs j on j.id = c.job_id
            where c.state = 'running' group by j.id
        """)
    )
    return [InFlight(*row) for row in rows]


def reopen(connection: Connection, job_id: UUID, codes: Sequence[str]) -> int:
    """Delete a job's rejects with one of `codes`, correct the counts, and make the chunks that held them pending again,
    with those that didn't settle all their items. Return the number of chunks reopened."""
    return connection.execute(
        text("""
            with gone as (
              delete from vectormill.rejects where job_id = :job and code = any(:codes) returning index
            ), again as (
              -- Each reject looks its chunk up, instead of each chunk all its rejects.
              select c.id, count(*) as rejects
              from gone g cross join lateral (
                select id from vectormill.chunks where job_id = :job and first_index <= g.index
                order by first_index desc limit 1) c
              group by c.id
            ), touched as (
              select c.id, coalesce(a.rejects, 0) as rejects
              from vectormill.chunks c left join again a on a.id = c.id
              where c.job_id = :job and (a.id is not null or c.items > c.vacant + c.embedded + c.reused + c.rejected)
            )
            update vectormill.chunks c
            set state = 'pending', rejected = c.rejected - t.rejects, cancelled = 0, crashes = 0, isolation = 0,
                -- Erased items that had neither vector nor reject get none any more.
                vacant = c.vacant + greatest(0, least(c.forgotten - c.forgotten_vectors - c.forgotten_rejects,
                                                      c.items - c.vacant - c.embedded - c.reused - c.rejected)),
                forgotten = c.forgotten_vectors + c.forgotten_rejects,
                fence = c.fence + 1, worker_id = null,
                not_before = null, lease_until = null, finished_at = null
            from touched t where c.id = t.id
        """),
        {"job": job_id, "codes": list(codes)},
    ).rowcount
