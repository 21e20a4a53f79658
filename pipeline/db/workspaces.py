"""Workspaces: weights in fair share, limits, webhooks, SQL roles and enabled models."""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, RowMapping, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as insert_or

from pipeline.db.tables import workspace_models, workspaces


def id_of(connection: Connection, name: str) -> int | None:
    """Return a workspace's id; None if there is none."""
    return connection.execute(select(workspaces.c.id).where(workspaces.c.name == name)).scalar_one_or_none()


def name_of(connection: Connection, workspace_id: int) -> str:
    """Return a workspace's name."""
    return str(connection.execute(select(workspaces.c.name).where(workspaces.c.id == workspace_id)).scalar_one())


def create(connection: Connection, name: str, weight: float) -> int | None:
    """Add a workspace. Return its id, or None if the name is taken."""
    statement = insert_or(workspaces).values(name=name, weight=weight).on_conflict_do_nothing()
    return connection.execute(statement.returning(workspaces.c.id)).scalar_one_or_none()


def set_weight(connection: Connection, workspace_id: int, weight: float) -> None:
    """Set a workspace's weight in fair share."""
    connection.execute(update(workspaces).where(workspaces.c.id == workspace_id).values(weight=weight))


def set_limits(connection: Connection, workspace_id: int, limits: Mapping[str, float | None]) -> None:
    """Set limits on use of the gateway, by column; None: no limit."""
    connection.execute(update(workspaces).where(workspaces.c.id == workspace_id).values(**limits))


def set_webhook(connection: Connection, workspace_id: int, url: str | None) -> None:
    """Set the URL of the webhook that is notified when the workspace's jobs end; None: no webhook."""
    connection.execute(update(workspaces).where(workspaces.c.id == workspace_id).values(webhook=url))


def set_sql_roles(connection: Connection, workspace_id: int, roles: Sequence[str]) -> None:
    """Set the Postgres roles that, with the owner, may submit the workspace's jobs in SQL. An empty list leaves the
    workspace `default` open to every role that may execute the function."""
    connection.execute(update(workspaces).where(workspaces.c.id == workspace_id).values(sql_roles=list(roles)))


def enable_models(connection: Connection, workspace_id: int, models: Sequence[str]) -> None:
    """Let a workspace use these models, and no others."""
    connection.execute(workspace_models.delete().where(workspace_models.c.workspace_id == workspace_id))
    rows = [{"workspace_id": workspace_id, "model_name": model} for model in models]
    if rows:
        connection.execute(insert(workspace_models), rows)


def every(connection: Connection) -> list[RowMapping]:
    """Return all workspaces by name: `name, weight, models, jobs, webhook, sql_roles` and limits. `jobs` is the number
    that haven't ended."""
    rows = connection.execute(
        text("""
            select w.name, w.weight, w.webhook, w.sql_roles,
                   w.requests_per_minute, w.tokens_per_minute, w.monthly_tokens,
                   cast(w.monthly_cost as double precision) as monthly_cost,
                   array(select m.model_name from vectormill.workspace_models m
                         where m.workspace_id = w.id order by 1) as models,
                   (select count(*) from vectormill.jobs j where j.workspace_id = w.id
                    and j.state not in ('completed', 'failed', 'cancelled')) as jobs
            from vectormill.workspaces w order by w.name
        """)
    )
    return list(rows.mappings())
