"""Monthly partitions of the tables that grow with items, by the timestamps in UUIDv7 job ids."""

from datetime import UTC, datetime
from uuid import UUID

from psycopg import sql
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, text

from pipeline.db.database import psycopg_connection
from pipeline.db.tables import PARTITIONED, SCHEMA


def month_of(job_id: UUID) -> datetime:
    """Return the start of the month in which `job_id`, a UUIDv7, was made."""
    made = datetime.fromtimestamp((job_id.int >> 80) / 1000, UTC)
    return made.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def next_month(month: datetime) -> datetime:
    """Return the start of the month after `month`."""
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def leaf(table: str, job_id: UUID) -> sql.Identifier:
    """Return the partition of `table` that holds a job's rows. COPY straight into it saves routing every row."""
    return sql.Identifier(SCHEMA, _name(table, month_of(job_id)))


def _name(table: str, month: datetime) -> str:
    return f"{table}_{month:%Y_%m}"


def lowest_id(moment: datetime) -> UUID:
    """Return a lower bound of the ids of jobs made from `moment` on."""
    return UUID(int=int(moment.timestamp() * 1000) << 80)


#: Longest wait for another process that makes partitions.
_LOCK_SECONDS = 10


def _exists(connection: Connection, table: str, month: datetime) -> bool:
    # Not to_regclass, which may remember within a transaction that a table wasn't there.
    known = text("select exists (select from pg_tables where schemaname = :schema and tablename = :name)")
    return connection.execute(known, {"schema": SCHEMA, "name": _name(table, month)}).scalar_one()


def make_month(connection: Connection, month: datetime) -> None:
    """Create the partitions for `month` where they don't exist, by the database's function (migration 0011)."""
    if all(_exists(connection, table, month) for table in PARTITIONED):
        return
    connection.execute(text("select set_config('lock_timeout', :limit, true)"), {"limit": f"{_LOCK_SECONDS}s"})
    connection.execute(text("select vectormill.make_partitions(:month)"), {"month": month.date()})
    connection.execute(text("set local lock_timeout to default"))


def months(connection: Connection) -> list[datetime]:
    """Return the months that have partitions, in order."""
    names = connection.execute(
        text("select tablename from pg_tables where schemaname = :schema and tablename ~ '^items_[0-9]{4}_[0-9]{2}$'"),
        {"schema": SCHEMA},
    ).scalars()
    return sorted(datetime.strptime(name, "items_%Y_%m").replace(tzinfo=UTC) for name in names)


def drop(connection: Connection, table: str, month: datetime, lock_seconds: float) -> bool:
    """Drop a month's partition of `table`, with all its rows. Return False if others kept the table locked for
    `lock_seconds`."""
    connection.execute(text("select set_config('lock_timeout', :limit, true)"), {"limit": f"{lock_seconds}s"})
    statement = sql.SQL("drop table if exists {}").format(sql.Identifier(SCHEMA, _name(table, month)))
    try:
        with connection.begin_nested():
            psycopg_connection(connection).execute(statement)
    except LockNotAvailable:
        return False
    return True


def this_month(connection: Connection) -> datetime:
    """Return the start of the current month, by the database's clock."""
    now: datetime = connection.execute(text("select now()")).scalar_one()
    return now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def make_ahead(connection: Connection) -> None:
    """Create this month's and the next month's partitions, by the database's clock."""
    month = this_month(connection)
    make_month(connection, month)
    make_month(connection, next_month(month))


def missing_ahead(connection: Connection) -> list[str]:
    """Return the names of this month's and the next month's partitions that don't exist."""
    month = this_month(connection)
    return [
        _name(table, each)
        for each in (month, next_month(month))
        for table in PARTITIONED
        if not _exists(connection, table, each)
    ]
