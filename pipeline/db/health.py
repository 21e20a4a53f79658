"""Queries of the doctor and of health checks."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, RowMapping, text

from pipeline.db.tables import SCHEMA


def server(connection: Connection) -> RowMapping:
    """Return the server's version and size, and the settings that stand in the way of writing: `version_number,
    version, in_recovery, read_only, superuser, database_bytes`."""
    return (
        connection.execute(
            text("""
            select current_setting('server_version_num')::int as version_number,
                   current_setting('server_version') as version, pg_is_in_recovery() as in_recovery,
                   current_setting('default_transaction_read_only') = 'on' as read_only,
                   (select rolsuper from pg_roles where rolname = current_user) as superuser,
                   pg_database_size(current_database()) as database_bytes
        """)
        )
        .mappings()
        .one()
    )


def settings(connection: Connection) -> dict[str, str]:
    """Return the server's settings that matter here, in their base units, as this role has them."""
    rows = connection.execute(
        text("""
            select name, setting from pg_settings
            where name in ('fsync', 'full_page_writes', 'max_connections', 'superuser_reserved_connections',
                           'reserved_connections', 'statement_timeout', 'transaction_timeout', 'idle_session_timeout',
                           'autovacuum')
        """)
    )
    return {row.name: row.setting for row in rows}


def replication(connection: Connection) -> RowMapping:
    """Return the state of replication to standbys: `standbys` connected now, `synchronous_standby_names`,
    `synchronous_commit`."""
    return (
        connection.execute(
            text("""
            select (select count(*) from pg_stat_replication) as standbys,
                   current_setting('synchronous_standby_names') as synchronous_standby_names,
                   current_setting('synchronous_commit') as synchronous_commit
        """)
        )
        .mappings()
        .one()
    )


def data_folder(connection: Connection) -> str | None:
    """Return the server's data folder; None if the role may not read it."""
    return connection.execute(
        text("""
            select case when pg_has_role('pg_read_all_settings', 'member') then
                     (select setting from pg_settings where name = 'data_directory') end
        """)
    ).scalar_one()


def now(connection: Connection) -> datetime:
    """Return the time of the database's clock."""
    moment: datetime = connection.execute(text("select clock_timestamp()")).scalar_one()
    return moment


def vector_version(connection: Connection) -> str | None:
    """Return the version of pgvector in this database; None if it isn't installed in it."""
    return connection.execute(text("select extversion from pg_extension where extname = 'vector'")).scalar_one_or_none()


def vector_available(connection: Connection) -> bool:
    """Return True if the server has pgvector's files, so that a database on it can install the extension."""
    found = connection.execute(text("select exists (select from pg_available_extensions where name = 'vector')"))
    return bool(found.scalar_one())


def revision(connection: Connection) -> str | None:
    """Return the schema's revision; None if there is no schema yet."""
    if not connection.execute(text(f"select to_regclass('{SCHEMA}.alembic_version')")).scalar_one():
        return None
    return connection.execute(text("select version_num from vectormill.alembic_version")).scalar_one_or_none()


def missing_rights(connection: Connection) -> list[str]:
    """Return the rights on our tables that this role lacks, as `insert jobs`; and `own items`, without which it can't
    make partitions."""
    rows = connection.execute(
        text("""
            select lower(r.privilege) || ' ' || c.relname
            from pg_class c join pg_namespace n on n.oid = c.relnamespace
            cross join unnest(array['SELECT', 'INSERT', 'UPDATE', 'DELETE']) as r (privilege)
            where n.nspname = :schema and c.relkind in ('r', 'p') and c.relname <> 'alembic_version'
              and not c.relispartition and not has_table_privilege(c.oid, r.privilege)
            union all
            select 'own ' || c.relname
            from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where n.nspname = :schema and c.relkind = 'p' and not pg_has_role(c.relowner, 'usage')
            order by 1
        """),
        {"schema": SCHEMA},
    )
    return list(rows.scalars())


def processes_served(connection: Connection) -> list[str]:
    """Return the kinds of processes whose group roles, made by ops/postgres/roles.sql, this login is a member of."""
    rows = connection.execute(
        text("""
            select substr(rolname, length('vectormill_') + 1) from pg_roles
            where rolname in ('vectormill_dispatcher', 'vectormill_worker', 'vectormill_engine', 'vectormill_api',
                              'vectormill_reader')
              and pg_has_role(oid, 'usage') and has_schema_privilege(rolname, :schema, 'usage')
            order by 1
        """),
        {"schema": SCHEMA},
    )
    return list(rows.scalars())


def roles_revision(connection: Connection) -> str | None:
    """Return the schema revision for which ops/postgres/roles.sql was last run; None if it never was."""
    return connection.execute(
        text("""
            select substring(obj_description(oid, 'pg_namespace') from 'roles.sql of ([0-9]+)')
            from pg_namespace where nspname = :schema
        """),
        {"schema": SCHEMA},
    ).scalar_one()


def overdue_chunks(connection: Connection, seconds: float) -> RowMapping:
    """Count the running chunks whose lease expired more than `seconds` ago: `chunks, jobs`, and `oldest_seconds` since
    the oldest expiry."""
    return (
        connection.execute(
            text("""
            select count(*) as chunks, count(distinct job_id) as jobs,
                   coalesce(extract(epoch from now() - min(lease_until)), 0)::float8 as oldest_seconds
            from vectormill.chunks
            where state = 'running' and lease_until < now() - make_interval(secs => :seconds)
        """),
            {"seconds": seconds},
        )
        .mappings()
        .one()
    )


def lease_seconds_left(connection: Connection, name: str) -> float | None:
    """Return the seconds left of the lease on the role `name`, negative once it has expired; None if it was never held,
    or was released."""
    return connection.execute(
        text("select extract(epoch from lease_until - now())::float8 from vectormill.leases where name = :name"),
        {"name": name},
    ).scalar_one_or_none()


def worker_seen(connection: Connection, host: str, seconds: float) -> bool:
    """Return True if a worker on this host was seen within `seconds`."""
    return connection.execute(
        text("""
            select exists (select from vectormill.workers
                           where host = :host and seen_at > now() - make_interval(secs => :age))
        """),
        {"host": host, "age": seconds},
    ).scalar_one()


def neighbour_seen(connection: Connection, application: str, seconds: float) -> bool:
    """Return True if a process named `application`, at the address that this connection comes from, has used its own
    connection within `seconds`."""
    return connection.execute(
        text("""
            select exists (select from pg_stat_activity
                           where application_name = :application and datname = current_database()
                             and client_addr is not distinct from inet_client_addr()
                             and state_change > now() - make_interval(secs => :age))
        """),
        {"application": application, "age": seconds},
    ).scalar_one()


def enabled_models(connection: Connection) -> Sequence[RowMapping]:
    """Return the models that at least one workspace may use, by name: `name, kind, gateway_url, key_env`."""
    rows = connection.execute(
        text("""
            select name, kind, gateway_url, key_env from vectormill.models m
            where exists (select from vectormill.workspace_models w where w.model_name = m.name) order by name
        """)
    )
    return list(rows.mappings())


def query_login(connection: Connection) -> RowMapping:
    """Return the rights of the login for requests' queries: `name, superuser, owner, reads_keys`. The last two concern
    our tables, where this database has them."""
    return (
        connection.execute(
            text("""
            select session_user as name, (select rolsuper from pg_roles where rolname = session_user) as superuser,
                   exists (select from pg_namespace
                           where nspname = :schema and pg_has_role(session_user, nspowner, 'member')) as owner,
                   exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                           where n.nspname = :schema and c.relname = 'api_keys'
                             and has_schema_privilege(n.oid, 'usage')
                             and has_table_privilege(c.oid, 'select')) as reads_keys
        """),
            {"schema": SCHEMA},
        )
        .mappings()
        .one()
    )
