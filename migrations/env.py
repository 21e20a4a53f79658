"""Alembic environment: one migrator at a time, which never waits long for a lock."""

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.schema import SchemaItem

from pipeline.db.tables import PARTITIONED, SCHEMA, metadata

# Arbitrary constant: the holder of this advisory lock migrates.
_LOCK = 0x766D696C6C


def _include(_item: SchemaItem, name: str | None, kind: str, _reflected: bool, _other: SchemaItem | None) -> bool:
    """Leave monthly partitions to `pipeline.db.partitions`."""
    return not (kind == "table" and name is not None and name.startswith(tuple(f"{t}_2" for t in PARTITIONED)))


def run(connection: Connection) -> None:
    """Bring the schema up to date on `connection`, in one transaction."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_schemas=True,
        include_name=lambda name, kind, _parents: kind != "schema" or name == SCHEMA,
        include_object=_include,
        version_table_schema=SCHEMA,
    )
    connection.execute(text("set local statement_timeout = '15min'"))
    connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    # From here on only transactions of others can hold locks: give up soon, since a migration that waits blocks them.
    connection.execute(text("set local lock_timeout = '10s'"))
    connection.execute(text(f"create schema if not exists {SCHEMA}"))
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
