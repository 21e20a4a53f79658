"""API keys, stored as hashes."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, text, update

from pipeline.db.tables import api_keys


def add(connection: Connection, values: Mapping[str, Any], lives: timedelta | None) -> None:
    """Insert a key that expires after `lives`, or never."""
    ends = None if lives is None else func.now() + lives
    connection.execute(insert(api_keys).values(**values, lives=lives, expires_at=ends))


def every(connection: Connection, workspace_id: int) -> list[RowMapping]:
    """Return a workspace's keys, newest first: `id, name, admin, live, created_at, expires_at, revoked_at`."""
    rows = connection.execute(
        text("""
            select id, name, admin, created_at,
                   revoked_at is null and (expires_at is null or expires_at > now()) as live,
                   expires_at, revoked_at
            from vectormill.api_keys where workspace_id = :workspace order by created_at desc, id
        """),
        {"workspace": workspace_id},
    )
    return list(rows.mappings())


def find_live(connection: Connection, key_ids: Sequence[str]) -> Sequence[RowMapping]:
    """Return the given keys that are neither revoked nor expired, with their workspaces' limits; `seconds_left` is None
    for a key that never expires."""
    rows = connection.execute(
        text("""
            select k.id, k.name, k.secret_sha256, k.admin, k.workspace_id, w.requests_per_minute, w.tokens_per_minute,
                   w.monthly_tokens, w.monthly_cost, extract(epoch from k.expires_at - now()) as seconds_left
            from vectormill.api_keys k join vectormill.workspaces w on w.id = k.workspace_id
            where k.id = any(:ids) and k.revoked_at is null and (k.expires_at is null or k.expires_at > now())
        """),
        {"ids": list(key_ids)},
    )
    return rows.mappings().all()


def expire(connection: Connection, workspace_id: int, key_id: str, after: timedelta) -> RowMapping | None:
    """Let a live key expire within `after` at the latest. Return its `name, admin, lives`; None if there is no such
    key."""
    rows = connection.execute(
        text("""
            update vectormill.api_keys set expires_at = least(expires_at, now() + :after)
            where id = :id and workspace_id = :workspace and revoked_at is null
              and (expires_at is null or expires_at > now())
            returning name, admin, lives
        """),
        {"id": key_id, "workspace": workspace_id, "after": after},
    )
    return rows.mappings().one_or_none()


def revoke(connection: Connection, workspace_id: int, key_id: str) -> bool:
    """Revoke a key now. Return False if there is none that isn't revoked."""
    return (
        connection.execute(
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.workspace_id == workspace_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=func.now())
        ).rowcount
        == 1
    )
