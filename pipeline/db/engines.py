"""Engines as they show themselves to the api."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def show(connection: Connection, engine_id: UUID, *, url: str, models: Sequence[str], device: str) -> None:
    """Say that an engine lives, where, and what it serves. Engines that fell silent a minute ago are forgotten."""
    connection.execute(text("delete from vectormill.engines where seen_at < now() - interval '1 minute'"))
    connection.execute(
        text("""
            insert into vectormill.engines (id, url, models, device) values (:id, :url, :models, :device)
            on conflict (id) do update set models = excluded.models, seen_at = now()
        """),
        {"id": engine_id, "url": url, "models": list(models), "device": device},
    )


def forget(connection: Connection, engine_id: UUID) -> None:
    """An engine has stopped."""
    connection.execute(text("delete from vectormill.engines where id = :id"), {"id": engine_id})


def live(connection: Connection, seconds: float) -> list[RowMapping]:
    """The engines that were seen within so many seconds, the longest running first."""
    rows = connection.execute(
        text("""
            select id, url, models, device, started_at, seen_at from vectormill.engines
            where seen_at > now() - make_interval(secs => :age) order by started_at, id
        """),
        {"age": seconds},
    )
    return list(rows.mappings())
