"""Connections to Postgres: timeouts, keep-alives, snapshots, COPY, and the classification of lost connections."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import orjson
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from pipeline.core.errors import LoginRefused, ServiceUnreachable, UserError

# A server that vanished is noticed within about half a minute instead of the kernel's quarter of an hour.
_CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_NO_URL = "the database URL is invalid; write it as postgresql://user:password@host/name."
# No transaction here stays open across work: one that idles this long belongs to a frozen process.
_SESSION = "set idle_in_transaction_session_timeout = '60s'"

#: Messages to a login that the server will never let in; the driver sets no SQLSTATE for them.
_LOGIN_REFUSED = re.compile(
    "authentication failed|no password supplied|no pg_hba.conf entry|(role|database) .* does not exist"
    "|permission denied for database|is not permitted to log in"
)


def make_engine(url: str, *, application: str, pool_size: int = 4, ping: bool = True) -> Engine:
    """Create an engine on `url` (`postgresql://…`, which may name several hosts), its connections named `application`
    in pg_stat_activity.

    `ping`: test a pooled connection before its use. Without it, the first use after a restart of the server fails.
    """
    if not url.startswith(("postgresql://", "postgres://")):
        raise UserError(_NO_URL)
    try:
        # Parsed by libpq, as psql does: SQLAlchemy's own URLs take one host, and are only for show here.
        parameters = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise UserError(_NO_URL) from None  # the message may quote the password
    engine = create_engine(
        _shown(parameters),
        connect_args={**_CONNECT_ARGS, **parameters, "application_name": application},
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=ping,
        # orjson reads numbers beyond 64 bits as floats, which every JSON writer can write.
        json_deserializer=orjson.loads,
        # Parameters may be documents, which no error message may show.
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: psycopg.Connection, _entry: ConnectionPoolEntry) -> None:
        connection.execute(_SESSION)
        connection.commit()

    return engine


def _shown(parameters: Mapping[str, Any]) -> URL:
    """Return a URL of the parameters that SQLAlchemy's URLs can hold."""
    port = str(parameters.get("port", ""))
    return URL.create(
        "postgresql+psycopg",
        username=parameters.get("user"),
        password=parameters.get("password"),
        host=parameters.get("host"),
        port=int(port) if port.isdecimal() else None,
        database=parameters.get("dbname"),
    )


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """Open a read-only transaction that sees one snapshot, as of its first statement, whatever others commit
    meanwhile."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection.begin():
            yield connection


@contextmanager
def held(engine: Engine, name: str) -> Iterator[Callable[[], None] | None]:
    """Hold a lock in a session of its own, for work on files, during which no transaction stays open. Yield a function
    that fails if the session has ended, and is to be called every few minutes, or the server ends it; None: somebody
    else has the lock."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text(_LOCK), {"name": name}).scalar_one():
            yield None
            return
        # A machine that vanished is noticed as soon as elsewhere.
        connection.execute(text(_SETTINGS))
        try:
            yield partial(ping, connection)
        finally:
            with suppress(DBAPIError):
                connection.execute(text(_UNLOCK), {"name": name})
            connection.invalidate()  # its settings end with the session, and the lock at the latest


def ping(connection: Connection) -> None:
    """Keep a session from idling. Raises `sqlalchemy.exc.DBAPIError` if it has ended."""
    connection.execute(text("select 1")).close()


_UNLOCK = "select pg_advisory_unlock(hashtextextended(:name, 0))"
_LOCK = "select pg_try_advisory_lock(hashtextextended(:name, 0))"
_SETTINGS = """
    select set_config('idle_session_timeout', '10min', false), set_config('tcp_keepalives_idle', '10', false),
           set_config('tcp_keepalives_interval', '5', false), set_config('tcp_keepalives_count', '3', false)
"""


def psycopg_connection(connection: Connection) -> psycopg.Connection:
    """Return the driver's connection beneath `connection`, for COPY; it is in the same transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver


def flush_later(connection: Connection) -> None:
    """Let this transaction's commit return before it is on disk. A later synchronous commit covers it."""
    connection.execute(text("set local synchronous_commit = off"))


def is_connection_lost(error: Exception) -> bool:
    """Return True if the connection failed, not the statement: the same work may succeed on a new one."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (isinstance(error, OperationalError) and _is_state_of_loss(error.orig))
    return isinstance(error, psycopg.OperationalError) and _is_state_of_loss(error)


def _is_state_of_loss(error: BaseException | None) -> bool:
    # A server that shuts down, starts up or crashed answers with class 57P; class 08 is a connection exception. An
    # OperationalError without a state is the network.
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(("57P", "08"))


def is_without_room(error: Exception) -> bool:
    """Return True if the server lacks disk, memory or connections: the same work may succeed later."""
    return (getattr(getattr(error, "orig", error), "sqlstate", None) or "").startswith("53")


@contextmanager
def copying(connection: Connection, table: sql.Identifier, columns: Sequence[str]) -> Iterator[psycopg.Copy]:
    """Open a binary COPY into `table`."""
    statement = sql.SQL("copy {} ({}) from stdin (format binary)").format(
        table, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with errors_as_sqlalchemys(), psycopg_connection(connection).cursor() as cursor, cursor.copy(statement) as copy:
        yield copy


@contextmanager
def errors_as_sqlalchemys() -> Iterator[None]:
    """Raise the driver's errors as SQLAlchemy's, where the driver is used directly."""
    try:
        yield
    except psycopg.Error as error:
        raise DBAPIError.instance("statement", None, error, psycopg.Error, hide_parameters=True) from error


def plain_reason(error: DBAPIError) -> str:
    """Return the database's objection, without the data that it would quote."""
    diagnosis = getattr(error.orig, "diag", None)
    primary = getattr(diagnosis, "message_primary", None)
    return f"{type(error.orig).__name__}: {primary or 'no message'}"


def connection_reason(error: Exception) -> str:
    """Return the reason why connecting failed, as the server or the network gives it. There are no data yet that it
    could quote."""
    first, *_ = str(getattr(error, "orig", error)).splitlines() or ["no message"]
    return first.rpartition("failed: ")[2].removeprefix("FATAL:").strip()


@contextmanager
def reporting_unreachable(what: str = "the database") -> Iterator[None]:
    """Turn a lost connection into `ServiceUnreachable`, without the URL, which may hold a password. A refused login
    becomes `LoginRefused`; a missing or old schema, `UserError`."""
    try:
        yield
    except (DBAPIError, psycopg.OperationalError) as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) in ("3F000", "42P01"):
            raise UserError(f"{what} has no schema for vectormill, or an old one; run: vectormill migrate") from error
        if is_without_room(error):
            cause = type(getattr(error, "orig", error)).__name__
            raise ServiceUnreachable(
                f"{what} is out of disk, memory or connections ({cause}); free some, then retry"
            ) from error
        if not is_connection_lost(error):
            raise
        if _LOGIN_REFUSED.search(connection_reason(error)):
            raise LoginRefused(
                f"{what} refuses the login in its URL ({connection_reason(error)}); correct VECTORMILL_DATABASE_URL."
            ) from error
        raise ServiceUnreachable(
            f"can't reach {what}; check VECTORMILL_DATABASE_URL, or unset it and start one with: vectormill up --detach"
        ) from error
