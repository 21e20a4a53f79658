"""Metadata of files in the Files API. Their bytes are in storage."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, func, text

from pipeline.db.tables import files


def insert(connection: Connection, file: Mapping[str, Any], lives_seconds: float | None) -> RowMapping:
    """Insert a file that expires after `lives_seconds`, or never. Return its row."""
    expires_at = text("now() + make_interval(secs => :lives)").bindparams(lives=lives_seconds)
    made = files.insert().values(**file, **({} if lives_seconds is None else {"expires_at": expires_at}))
    return connection.execute(made.returning(files)).mappings().one()


def find(connection: Connection, workspace_id: int, file_id: str) -> RowMapping | None:
    """Return a workspace's file, unless it has expired."""
    found = files.select().where(
        files.c.id == file_id, files.c.workspace_id == workspace_id, text("coalesce(expires_at > now(), true)")
    )
    return connection.execute(found).mappings().one_or_none()


def page(
    connection: Connection, workspace_id: int, *, purpose: str | None, after: str | None, oldest_first: bool, limit: int
) -> Sequence[RowMapping]:
    """Return a page of a workspace's files in order of creation, past the cursor `after`. Expired ones are left out."""
    found = files.select().where(files.c.workspace_id == workspace_id, text("coalesce(expires_at > now(), true)"))
    if purpose is not None:
        found = found.where(files.c.purpose == purpose)
    if after is not None:
        found = found.where(files.c.id > after if oldest_first else files.c.id < after)
    order = files.c.id if oldest_first else files.c.id.desc()
    return connection.execute(found.order_by(order).limit(limit)).mappings().all()


def delete(connection: Connection, file_id: str) -> bool:
    """Delete a file's row. Return False if there was none."""
    return connection.execute(files.delete().where(files.c.id == file_id)).rowcount > 0


def expire(connection: Connection, file_ids: Sequence[str]) -> None:
    """Expire files now."""
    connection.execute(files.update().where(files.c.id.in_(file_ids)).values(expires_at=func.now()))


def expired(connection: Connection, limit: int) -> list[str]:
    """Return the ids of files that have expired."""
    rows = connection.execute(
        text("select id from vectormill.files where expires_at <= now() order by expires_at limit :limit"),
        {"limit": limit},
    )
    return list(rows.scalars())


def uri_of(connection: Connection, file_id: str) -> str | None:
    """Return the URI of a file's bytes; None if there is no such file."""
    return connection.execute(
        text("select uri from vectormill.files where id = :file"), {"file": file_id}
    ).scalar_one_or_none()


def reading(connection: Connection, file_id: str) -> str | None:
    """Return a batch request of this file that hasn't ended; None if there is none."""
    found = text("""
        select id from vectormill.batches where ended_at is null and input_file_id = :file order by id limit 1
    """)
    batch: str | None = connection.execute(found, {"file": file_id}).scalar_one_or_none()
    return batch


def exchange(connection: Connection, file_id: str, other_id: str) -> bool:
    """Exchange the bytes of two files. Return False, with nothing done, if one of them is gone."""
    rows = connection.execute(
        text("""
            update vectormill.files f
            set uri = o.uri, etag = o.etag, bytes = o.bytes, sha256 = o.sha256
            from vectormill.files o
            where (f.id, o.id) in ((:file, :other), (:other, :file))
        """),
        {"file": file_id, "other": other_id},
    )
    return rows.rowcount == 2
