"""Rejects: the items that could not be embedded, as they are listed and counted."""

from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def page(connection: Connection, job_id: UUID, after: int, limit: int, code: str | None = None) -> list[dict[str, Any]]:
    """A page of a job's rejects in index order, from the first one past index `after`; only those of `code`, if
    given."""
    rows = connection.execute(
        text("""
            select index, key, code, message from vectormill.rejects
            where job_id = :job and index > :after and (cast(:code as text) is null or code = :code)
            order by index limit :limit
        """),
        {"job": job_id, "after": after, "limit": limit, "code": code},
    )
    return [dict(row) for row in rows.mappings()]


def count_by_code(connection: Connection, job_id: UUID) -> dict[str, int]:
    """How many rejects a job has, by code, the commonest first."""
    rows = connection.execute(
        text("""
            select code, count(*) from vectormill.rejects where job_id = :job group by code order by 2 desc, 1
        """),
        {"job": job_id},
    )
    return {row[0]: row[1] for row in rows}


def page_with_carried(connection: Connection, job_id: UUID, after: int, limit: int) -> list[RowMapping]:
    """As `page`, each with what its item carries."""
    # Looked up row by row, for the reason that embeddings.py gives.
    rows = connection.execute(
        text("""
            select r.index, r.key, r.code, r.message,
                   (select carried from vectormill.items where job_id = :job and index = r.index) as carried
            from vectormill.rejects r where r.job_id = :job and r.index > :after order by r.index limit :limit
        """),
        {"job": job_id, "after": after, "limit": limit},
    )
    return list(rows.mappings())
