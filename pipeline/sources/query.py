"""Query source: rows of a query, streamed from a database in bounded memory."""

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import sqlalchemy
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader
from sqlalchemy import Connection, CursorResult, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from pipeline.core import exact_json
from pipeline.core.errors import ServiceUnreachable, SourceError, SourceStopped, UserError, VectormillError
from pipeline.core.options import Columns
from pipeline.sources.validation import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    BadRow,
    Notices,
    Parsed,
    Rows,
    compose,
    judge,
    missing_column,
    shown,
    without_key,
)
from pipeline.sources.values import carried

#: Rows that the driver fetches at once: a thousand of the longest texts would already be too many.
_FETCH_ROWS = 500
_EXTRAS = {"duckdb": "duckdb", "snowflake": "snowflake", "bigquery": "bigquery"}
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "application_name": "vectormill-source",
}
#: Read-only; an interval used as a key is written in Postgres' default style, whatever the server's setting.
_READ_ONLY = "-c default_transaction_read_only=on -c intervalstyle=postgres"
#: Sets the statement timeout to the limit given, unless the role's own one is lower.
_LIMIT_STATEMENTS = """
select set_config('statement_timeout', least(nullif(setting::bigint, 0), %s)::text, false)
from pg_settings where name = 'statement_timeout'
"""
#: Timeout for sending a cancel request, and again for its effect, before the connection is cut.
_CANCEL_SECONDS = 5.0
#: Classes of Postgres errors whose messages quote values of rows, or are a function's own text.
_QUOTING = ("22", "23", "P0")
#: Postgres' code for a statement that was cancelled, by its timeout or by a person.
_CANCELED = "57014"


class QueryCorpus:
    """Rows of a query on Postgres, DuckDB, or any database that SQLAlchemy has a driver for."""

    def __init__(
        self,
        url: str,
        query: str,
        columns: Columns,
        item_bytes: int,
        *,
        asked_by: str = "from",
        movable: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Set up the engine; no connection is made yet.

        Args:
            url: the database's URL, as SQLAlchemy writes it.
            query: one statement that returns rows.
            columns: the columns to read.
            item_bytes: the longest text in bytes; a longer one is rejected.
            asked_by: the option or setting that gives the URL, for messages.
            movable: the database keeps its identity at another address, so the fingerprint holds its name alone.
            seconds: time limit from the query's start to its last row; Postgres only.

        Raises:
            UserError: the URL isn't one, or its driver isn't installed.
        """
        self.columns = columns
        self.item_bytes = item_bytes
        self.notices = Notices()
        self._asked_by = asked_by
        self._url = _parsed(url, asked_by)
        self._query = query.strip().rstrip(";")
        self._movable = movable
        self._seconds = seconds
        #: Guards `_reading` and `_stopped`, which `stop` uses from another thread.
        self._lock = threading.Lock()
        self._reading: tuple[psycopg.Connection, socket.socket] | None = None
        self._stopped: VectormillError | None = None
        self._ended = threading.Event()
        self._engine = _engine(self._url, asked_by)

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        return f"the query on {self._address}"

    @property
    def _address(self) -> str:
        """URL without the parts that may be secret."""
        return URL.create(
            self._url.drivername.partition("+")[0],
            host=self._url.host,
            port=self._url.port,
            database=self._url.database,
        ).render_as_string()

    def inputs(self) -> list[dict[str, Any]]:
        """Return the one input that the job records."""
        etag = hashlib.sha256(self._query.encode()).hexdigest()
        return [{"uri": self._address, "etag": etag, "bytes": None}]

    def fingerprint(self) -> str:
        """Return the SHA-256 over the database's address (its name if it is movable), the query and the columns."""
        database = self._url.database if self._movable else self._address
        return hashlib.sha256(json.dumps([database, self._query, self.columns.identity]).encode()).hexdigest()

    def read_fingerprint(self) -> str:
        """Return the fingerprint, for which nothing needs to be read."""
        return self.fingerprint()

    def blocks(self) -> Iterator[Rows]:
        """Run the query, and yield every row once, in its order.

        Raises:
            SourceError: the database refuses the query, or a column is missing or can't be used.
            SourceStopped: the query has run past its time limit, or was ended in the database.
            ServiceUnreachable: the database can't be reached, or was lost midway.
        """
        try:
            with self._engine.connect() as connection, self._stoppable(connection):
                yield from self._read(connection)
        except DBAPIError as error:
            raise self._stopped or self._as_ours(error) from None
        finally:
            self._engine.dispose()

    def again(self) -> "QueryCorpus":
        """Return the same source, to be read once more; its rows may have changed meanwhile."""
        return QueryCorpus(
            self._url.render_as_string(hide_password=False),
            self._query,
            self.columns,
            self.item_bytes,
            asked_by=self._asked_by,
            movable=self._movable,
            seconds=self._seconds,
        )

    def stop(self, why: VectormillError) -> None:
        """Make the reading thread raise `why` instead of going on. Called from another thread; Postgres only."""
        with self._lock:
            self._stopped = self._stopped or why
            if self._reading is None:
                return
            driver, connected = self._reading
            with suppress(psycopg.Error):
                driver.cancel_safe(timeout=_CANCEL_SECONDS)
        if self._ended.wait(_CANCEL_SECONDS):
            return
        # The server doesn't respond, or the cancelled statement was over already and more rows are being fetched.
        with self._lock, suppress(OSError):
            if self._reading is not None:
                connected.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _stoppable(self, connection: Connection) -> Iterator[None]:
        driver = connection.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            yield
            return
        # A duplicate: the driver's descriptor may be another connection's by the time it is used.
        with socket.socket(fileno=os.dup(driver.fileno())) as connected:
            with self._lock:
                if self._stopped:
                    raise self._stopped
                self._reading = driver, connected
            _read_exactly(driver)
            try:
                with self._limited(connection):
                    yield
            finally:
                self._ended.set()
                with self._lock:
                    self._reading = None

    @contextmanager
    def _limited(self, connection: Connection) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        told = f"{self.name}: it has taken longer than {self._seconds:,g} s, the most that it may."
        timer = threading.Timer(self._seconds, self.stop, [SourceStopped(told)])
        timer.daemon = True
        timer.start()
        try:
            # Stops a server that goes on after its client has gone. A query can undo this, but not the timer.
            connection.exec_driver_sql(_LIMIT_STATEMENTS, (int(self._seconds * 1000),))
            yield
        finally:
            timer.cancel()

    def _read(self, connection: Connection) -> Iterator[Rows]:
        # Sent as it was written: a colon or a percent sign is no parameter.
        streaming = connection.execution_options(stream_results=True, no_parameters=True)
        with streaming.exec_driver_sql(self._query) as found:
            yield from self._blocks(found)

    def _blocks(self, found: CursorResult[Any]) -> Iterator[Rows]:
        if not found.returns_rows:
            raise SourceError(f"{self.name}: it returns no rows; write one select.")
        names = list(found.keys())
        self._check(names)
        at = {name: names.index(name) for name in self.columns.names if name in names}
        texts_at = [at[column] for _, column in self.columns.texts]
        first = 1
        rows: list[Sequence[Any]] = []
        size = 0
        for fetched in found.partitions(_FETCH_ROWS):
            rows += fetched
            texts = (row[column] for row in fetched for column in texts_at)
            size += sum(len(text) for text in texts if isinstance(text, str))
            if len(rows) >= BLOCK_ROWS or size >= BLOCK_BYTES:
                yield self._judged(rows, at, first)
                first, rows, size = first + len(rows), [], 0
        if rows:
            yield self._judged(rows, at, first)

    def _check(self, names: list[str]) -> None:
        for field, column in self.columns.required:
            if column not in names:
                raise missing_column(self.name, field, column, names, [n for n in names if n != self.columns.key])
        for _, column in (*self.columns.required, ("", self.columns.key)):
            if names.count(column) > 1:
                raise SourceError(f'{self.name}: the column "{shown(column)}" comes twice; name one of them otherwise.')
        if self.columns.key not in names:
            self.notices.add("no key", without_key(self.name, self.columns.key, names))

    def _judged(self, rows: list[Sequence[Any]], at: dict[str, int], first: int) -> Rows:
        key = at.get(self.columns.key)
        texts, titles = self._texts(rows, at)
        more = None
        if self.columns.carry:
            more = [{name: self._carried(name, row[at[name]]) for name in self.columns.carry} for row in rows]
        parsed = Parsed(
            range(first, first + len(rows)),
            texts,
            [None if key is None else row[key] for row in rows],
            more,
            titles,
        )
        return judge(parsed, self.item_bytes, "row ")

    def _texts(self, rows: list[Sequence[Any]], at: dict[str, int]) -> tuple[list[object], list[object] | None]:
        columns = self.columns
        if not columns.composed:
            text = at[columns.text]
            return [_plain(row[text]) for row in rows], None
        wanted = [column for _, column in columns.texts]
        texts, titles = compose(columns, [{column: row[at[column]] for column in wanted} for row in rows])
        return list(map(_plain, texts)), titles

    def _carried(self, name: str, value: Any) -> Any:
        try:
            return carried(value)
        except TypeError as error:
            raise SourceError(
                f'{self.name}: column "{shown(name)}" holds {error}, which can\'t be carried; cast it to text.'
            ) from None

    def _as_ours(self, error: DBAPIError) -> Exception:
        """Convert a database error to ours, without data and without the password."""
        diagnosis = getattr(error.orig, "diag", None)
        primary = getattr(diagnosis, "message_primary", None)
        state = getattr(error.orig, "sqlstate", None)
        if primary and not (state or "").startswith(("08", "57P")):
            quotes = (state or "").startswith(_QUOTING)
            kind = SourceStopped if state == _CANCELED else SourceError
            return kind(f"{self.name}: {type(error.orig).__name__ if quotes else primary}.")
        if self._url.get_backend_name() == "postgresql":
            if not isinstance(error, OperationalError | InterfaceError):  # the driver's own: infinity is no date to it
                return SourceError(
                    f"{self.name}: a value can't be read ({type(error.orig).__name__}); cast it to text."
                )
            return ServiceUnreachable(f"can't reach {self._address}, the source's database; nothing was submitted.")
        first_line = str(error.orig).strip().splitlines()[0][:300] if str(error.orig).strip() else "no reason given"
        return SourceError(f"{self.name}: {first_line}")


def _parsed(url: str, asked_by: str) -> URL:
    try:
        made = sqlalchemy.make_url(url)
    except ArgumentError:
        raise UserError("not a URL; write it as postgresql://user:password@host/database.", field=asked_by) from None
    if made.drivername in ("postgresql", "postgres"):
        return made.set(drivername="postgresql+psycopg")
    return made


def _engine(url: URL, asked_by: str) -> Engine:
    backend = url.drivername.partition("+")[0]
    arguments: dict[str, Any] = {"duckdb": {"read_only": True}}.get(backend, {})
    if backend == "postgresql":
        own = url.query.get("options", ())
        # Ours come last, so that they win.
        options = " ".join([own] if isinstance(own, str) else own)
        arguments = _POSTGRES | {"options": f"{options} {_READ_ONLY}".strip()}
    try:
        return sqlalchemy.create_engine(url, connect_args=arguments, hide_parameters=True)
    except (NoSuchModuleError, ImportError):
        extra = _EXTRAS.get(backend)
        mend = f"pip install 'vectormill[{extra}]'" if extra else "install a driver of SQLAlchemy for it"
        raise UserError(f"its driver isn't installed; {mend}.", field=asked_by, given=f"{backend}://…") from None


def _plain(value: Any) -> Any:
    """Return a text's value for `judge`: a type that JSON lacks becomes a number, to be rejected as not a string."""
    return value if value is None or isinstance(value, str | int | float | bool | list | dict | BadRow) else 0


def _read_exactly(driver: psycopg.Connection) -> None:
    """Make the driver keep values that Python's types hold only roughly as Postgres writes them."""
    driver.adapters.register_loader("interval", TextLoader)
    set_json_loads(exact_json.loads, driver)
