"""Workspaces."""

from sqlalchemy import Connection, select

from pipeline.tables import workspaces


def id_of(connection: Connection, name: str) -> int | None:
    """A workspace's id."""
    return connection.execute(select(workspaces.c.id).where(workspaces.c.name == name)).scalar_one_or_none()
