"""Recorded parts of a job's Parquet output. Only recorded files count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from pipeline.core.chunks import Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Parquet part, as a commit records it."""

    chunk_id: int
    fence: int
    part: int
    #: File name within the job's folder.
    name: str
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Staged:
    """Parquet part that is written, but counts for nothing until it is recorded."""

    output: Output
    #: Location of the part once its job is completed.
    uri: str


def record(connection: Connection, claim: Claim, output: Output) -> None:
    """Record a part so that it counts, within the transaction of the chunk's fenced update."""
    connection.execute(
        text("""
            insert into vectormill.outputs (job_id, chunk_id, fence, part, name, rows, bytes)
            values (:job, :chunk, :fence, :part, :name, :rows, :bytes)
        """),
        {
            "job": claim.job_id,
            "chunk": claim.chunk_id,
            "fence": claim.fence,
            "part": output.part,
            "name": output.name,
            "rows": output.rows,
            "bytes": output.bytes,
        },
    )


def of_job(connection: Connection, job_id: UUID, chunk_id: int | None = None) -> list[Output]:
    """Return the parts of a job, or of one chunk, in the order of chunks and commits."""
    rows = connection.execute(
        text("""
            select chunk_id, fence, part, name, rows, bytes from vectormill.outputs
            where job_id = :job and (cast(:chunk as bigint) is null or chunk_id = :chunk)
            order by chunk_id, fence, part
        """),
        {"job": job_id, "chunk": chunk_id},
    )
    return [Output(**row) for row in rows.mappings()]


_FORGET = """
    update vectormill.chunks c
    set forgotten_vectors = forgotten_vectors + cardinality(cast(:indexes as bigint[])),
        forgotten_passages = forgotten_passages + :passages, forgotten = forgotten + :unknown,
        output_uri = replace(output_uri, :before, :name),
        most_truncated = (select coalesce(jsonb_agg(e), '[]') from jsonb_array_elements(c.most_truncated) e
                          where (e->>'index')::bigint <> all(:indexes))
    where id = :chunk
"""


def replace(
    connection: Connection,
    job_id: UUID,
    output: Output,
    by: Output,
    erased: Sequence[int],
    *,
    passages: int,
    unknown: int,
) -> bool:
    """Let a part count instead of another one, which had `erased` items and so many `passages` more; `unknown` of the
    items aren't counted as forgotten yet. Return False if the other one counts no more."""
    replaced = connection.execute(
        text("""
            update vectormill.outputs set name = :name, rows = :rows, bytes = :bytes
            where job_id = :job and name = :before
        """),
        {"job": job_id, "before": output.name, "name": by.name, "rows": by.rows, "bytes": by.bytes},
    ).rowcount
    if replaced:
        values = {
            "chunk": output.chunk_id,
            "indexes": list(erased),
            "passages": passages,
            "unknown": unknown,
            "before": output.name,
            "name": by.name,
        }
        connection.execute(text(_FORGET), values)
        # It has the keys of truncated items.
        connection.execute(text("update vectormill.jobs set progress = null where id = :job"), {"job": job_id})
    return bool(replaced)


def digest(connection: Connection, job_id: UUID) -> str:
    """Return a digest of a job's recorded parts. Their number alone isn't enough, since a failover may have replaced
    some."""
    found = text("""
        select count(*) || ' ' || coalesce(sum(hashtextextended(name, 0)), 0)
        from vectormill.outputs where job_id = :job
    """)
    return str(connection.execute(found, {"job": job_id}).scalar_one())


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChunk:
    """Counts of a chunk, with its recorded parts."""

    first_index: int
    items: int
    #: Items that are embedded or reused, their passages, and rejects, without those that were erased since.
    written: int
    passages: int
    rejected: int
    #: Items of an ended chunk that are in none of its counts.
    unaccounted: int
    outputs: list[Output]


def by_chunk(connection: Connection, job_id: UUID) -> Iterator[WrittenChunk]:
    """Yield a job's chunks in order, with their parts."""
    rows = connection.execution_options(yield_per=1_000).execute(
        text("""
            select c.first_index, c.items, c.embedded + c.reused - c.forgotten_vectors,
                   c.passages - c.forgotten_passages, c.rejected - c.forgotten_rejects,
                   case when c.state in ('done', 'cancelled')
                        then greatest(0, c.items - c.vacant - c.embedded - c.reused - c.rejected - c.cancelled)
                        else 0 end as unaccounted,
                   (select jsonb_agg(jsonb_build_object('chunk_id', o.chunk_id, 'fence', o.fence, 'part', o.part,
                                     'name', o.name, 'rows', o.rows, 'bytes', o.bytes) order by o.fence, o.part)
                    from vectormill.outputs o where o.job_id = :job and o.chunk_id = c.id) as parts
            from vectormill.chunks c where c.job_id = :job order by c.first_index
        """),
        {"job": job_id},
    )
    for *counts, written in rows:
        names = ("first_index", "items", "written", "passages", "rejected", "unaccounted")
        outputs = [Output(**output) for output in written or ()]
        yield WrittenChunk(**dict(zip(names, counts, strict=True)), outputs=outputs)
