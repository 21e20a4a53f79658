"""Heartbeats of engines, by which the api finds them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text


def show(connection: Connection, engine_id: UUID, *, url: str, models: Sequence[str], device: str) -> None:
    """Record an engine's heartbeat: its URL, models and device. Engines not seen for a minute are deleted."""
    connection.execute(text("delete from vectormill.engines where seen_at < now() - interval '1 minute'"))
    connection.execute(
        text("""
            insert into vectormill.engines (id, url, models, device) values (:id, :url, :models, :device)
            on conflict (id) do update set models = excluded.models, seen_at = now()
        """),
        {"id": engine_id, "url": url, "models": list(models), "device": device},
    )


def delete(connection: Connection, engine_id: UUID) -> None:
    """Delete an engine that has stopped."""
    connection.execute(text("delete from vectormill.engines where id = :id"), {"id": engine_id})


def live(connection: Connection, seconds: float) -> list[RowMapping]:
    """Return the engines seen within `seconds`, the longest running first."""
    rows = connection.execute(
        text("""
            select id, url, models, device, started_at, seen_at from vectormill.engines
            where seen_at > now() - make_interval(secs => :age) order by started_at, id
        """),
        {"age": seconds},
    )
    return list(rows.mappings())
