"""Checks and repairs of a database that was restored, or has failed over."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg import sql
from sqlalchemy import Connection, RowMapping, text

from pipeline.db.database import psycopg_connection
from pipeline.db.tables import SCHEMA, metadata


@dataclass(frozen=True, slots=True)
class IdSequence:
    """Sequence that gives a column its ids."""

    name: str
    table: str
    column: str
    #: The highest id in use.
    highest: int


def sequences_behind(connection: Connection) -> list[IdSequence]:
    """Return the sequences that would repeat an id in use, as they may after a restore of tables without them."""
    driver, found = psycopg_connection(connection), []
    for table in metadata.sorted_tables:
        for column in table.columns:
            if column.identity is None:
                continue
            ask = sql.SQL("select pg_get_serial_sequence(%s, %s), max({}) from {}").format(
                sql.Identifier(column.name), sql.Identifier(SCHEMA, table.name)
            )
            name, highest = driver.execute(ask, (f"{SCHEMA}.{table.name}", column.name)).fetchone() or (None, None)
            if name is None or highest is None:
                continue
            last = driver.execute("select pg_sequence_last_value(%s::regclass)", (name,)).fetchone()
            if last is None or last[0] is None or last[0] < highest:
                found.append(IdSequence(name, table.name, column.name, highest))
    slots = driver.execute(_SLOTS).fetchone()
    if slots and slots[0] is not None and (slots[1] is None or slots[1] < slots[0]):
        found.append(IdSequence("vectormill.collection_slots", "collection_keys", "slot", slots[0]))
    return found


_SLOTS = """
    select greatest((select max(slot) from vectormill.collection_keys), (select max(last_slot) from vectormill.syncs)),
           pg_sequence_last_value('vectormill.collection_slots')
"""


def advance(connection: Connection, sequence: IdSequence) -> None:
    """Advance a sequence past the highest id in use."""
    values = {"name": sequence.name, "highest": sequence.highest}
    connection.execute(
        # Others may have taken ids since the check.
        text("""
            select setval(cast(:name as regclass),
                          greatest(:highest, coalesce(pg_sequence_last_value(cast(:name as regclass)), 1)))
        """),
        values,
    )


def stale_claims(connection: Connection) -> int:
    """Return the number of running chunks whose lease has expired: claims from before the restore."""
    found = text("select count(*) from vectormill.chunks where state = 'running' and lease_until < now()")
    return int(connection.execute(found).scalar_one())


def give_back_stale_claims(connection: Connection) -> int:
    """Make chunks with an expired lease pending again. No text is to blame, so none counts as a crash. Return the
    number of chunks."""
    return connection.execute(
        text("""
            update vectormill.chunks set state = 'pending', lease_until = null, worker_id = null
            where id in (select id from vectormill.chunks where state = 'running' and lease_until < now()
                         for update skip locked)
        """)
    ).rowcount


def open_jobs(connection: Connection) -> list[RowMapping]:
    """Return the jobs that haven't ended, oldest first: `id, name, state`."""
    return list(
        connection.execute(
            text("""
            select id, name, state from vectormill.jobs where state not in ('completed', 'failed', 'cancelled')
            order by id
        """)
        ).mappings()
    )


def jobs_with_parts(connection: Connection) -> list[RowMapping]:
    """Return the jobs with recorded parts of a Parquet output: `id, name, state, folder`."""
    return list(
        connection.execute(
            text("""
            select j.id, j.name, j.state, j.options->>'output' as folder from vectormill.jobs j
            where j.options->>'output' <> '' and exists (select from vectormill.outputs o where o.job_id = j.id)
            order by j.id
        """)
        ).mappings()
    )


def forget_parts(connection: Connection, job_id: UUID, names: Sequence[str]) -> int:
    """Delete the records of parts whose files are gone, and reopen their chunks, so that their items are embedded
    again. Return the number of chunks. Metered usage stays, since it is the bill. What truncation lost in the chunks
    is counted anew from here on, since no part tells its share."""
    return connection.execute(
        text("""
            with gone as (
              delete from vectormill.outputs where job_id = :job and name = any(:names)
              returning chunk_id, fence, part, rows
            ), lost as (
              select g.chunk_id, sum(coalesce(u.items, g.rows)) as items, sum(g.rows) as rows,
                     coalesce(sum(u.prompt_tokens), 0) as tokens,
                     coalesce(sum(u.reused_items), 0) as reused, coalesce(sum(u.reused_tokens), 0) as reused_tokens,
                     coalesce(sum(u.truncated), 0) as truncated
              from gone g left join vectormill.usage u
                on u.chunk_id = g.chunk_id and u.fence = g.fence and u.part = g.part
              group by g.chunk_id
            )
            update vectormill.chunks c
            set state = 'pending', fence = c.fence + 1, worker_id = null, lease_until = null, not_before = null,
                finished_at = null, embedded = c.embedded - l.items, prompt_tokens = c.prompt_tokens - l.tokens,
                reused = c.reused - l.reused, reused_tokens = c.reused_tokens - l.reused_tokens,
                passages = greatest(0, c.passages - l.rows), lost_tokens = 0, most_truncated = '[]',
                truncated = c.truncated - l.truncated
            from lost l where c.id = l.chunk_id
        """),
        {"job": job_id, "names": list(names)},
    ).rowcount


def kept_files(connection: Connection) -> list[tuple[str, str]]:
    """Return the files of the Files API that haven't expired: (id, uri)."""
    rows = connection.execute(
        text("select id, uri from vectormill.files where coalesce(expires_at > now(), true) order by id")
    )
    return [(row[0], row[1]) for row in rows]


def live_keys(connection: Connection) -> int:
    """Return the number of API keys that are neither revoked nor expired."""
    found = text("""
        select count(*) from vectormill.api_keys where revoked_at is null and coalesce(expires_at > now(), true)
    """)
    return int(connection.execute(found).scalar_one())


def newest_moment(connection: Connection) -> datetime | None:
    """Return the time of the newest job or usage row; None if there is none."""
    return connection.execute(
        text("""
            select greatest((select max(created_at) from vectormill.jobs),
                            (select max(created_at) from vectormill.usage))
        """)
    ).scalar_one_or_none()
