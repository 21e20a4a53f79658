"""Rejects: pages and counts of a job's items that could not be embedded."""

from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def page(connection: Connection, job_id: UUID, after: int, limit: int, code: str | None = None) -> list[dict[str, Any]]:
    """Return a page of a job's rejects in index order, past index `after`; only those of `code`, if given."""
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
    """Return the number of a job's rejects by code, the most frequent first."""
    rows = connection.execute(
        text("""
            select code, count(*) from vectormill.rejects where job_id = :job group by code order by 2 desc, 1
        """),
        {"job": job_id},
    )
    return {row[0]: row[1] for row in rows}


def page_with_carried(connection: Connection, job_id: UUID, after: int, limit: int) -> list[RowMapping]:
    """Return a page like `page`, with the carried columns of each item."""
    # A subquery per row, not a join, for the reason that embeddings.py gives.
    rows = connection.execute(
        text("""
            select r.index, r.key, r.code, r.message,
                   (select carried from vectormill.items where job_id = :job and index = r.index) as carried
            from vectormill.rejects r where r.job_id = :job and r.index > :after order by r.index limit :limit
        """),
        {"job": job_id, "after": after, "limit": limit},
    )
    return list(rows.mappings())
