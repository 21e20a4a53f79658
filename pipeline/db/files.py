"""Files of the Files API: what is kept of each beside its bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, func, text

from pipeline.db.tables import files


def insert(connection: Connection, file: Mapping[str, Any], lives_seconds: float | None) -> RowMapping:
    """Write a file down; it lives so long, or for ever. Returns its row."""
    expires_at = text("now() + make_interval(secs => :lives)").bindparams(lives=lives_seconds)
    made = files.insert().values(**file, **({} if lives_seconds is None else {"expires_at": expires_at}))
    return connection.execute(made.returning(files)).mappings().one()


def find(connection: Connection, workspace_id: int, file_id: str) -> RowMapping | None:
    """A workspace's file, unless it has expired."""
    found = files.select().where(
        files.c.id == file_id, files.c.workspace_id == workspace_id, text("coalesce(expires_at > now(), true)")
    )
    return connection.execute(found).mappings().one_or_none()


def page(
    connection: Connection, workspace_id: int, *, purpose: str | None, after: str | None, oldest_first: bool, limit: int
) -> Sequence[RowMapping]:
    """A workspace's files in the order of their making, from the one past `after` on."""
    found = files.select().where(files.c.workspace_id == workspace_id, text("coalesce(expires_at > now(), true)"))
    if purpose is not None:
        found = found.where(files.c.purpose == purpose)
    if after is not None:
        found = found.where(files.c.id > after if oldest_first else files.c.id < after)
    order = files.c.id if oldest_first else files.c.id.desc()
    return connection.execute(found.order_by(order).limit(limit)).mappings().all()


def delete(connection: Connection, file_id: str) -> bool:
    """Forget a file. False: it was forgotten before."""
    return connection.execute(files.delete().where(files.c.id == file_id)).rowcount > 0


def expire(connection: Connection, file_ids: Sequence[str]) -> None:
    """Let files be past their time."""
    connection.execute(files.update().where(files.c.id.in_(file_ids)).values(expires_at=func.now()))


def expired(connection: Connection, limit: int) -> list[str]:
    """Files that are past their time, by id."""
    rows = connection.execute(
        text("select id from vectormill.files where expires_at <= now() order by expires_at limit :limit"),
        {"limit": limit},
    )
    return list(rows.scalars())


def uri_of(connection: Connection, file_id: str) -> str | None:
    """Where a file's bytes are."""
    return connection.execute(
        text("select uri from vectormill.files where id = :file"), {"file": file_id}
    ).scalar_one_or_none()
