"""Metering of requests: usage rows are written within a quarter of a second after the reply.

The reasons are in docs/explanation/decisions/0006.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import structlog

from pipeline.api.database import Database, unreachable
from pipeline.db import usage
from pipeline.infra import metrics

log = structlog.get_logger()

_PERIOD_SECONDS = 0.25
_BATCH = 1_000
#: Rows that may wait while the database is away. Beyond it requests are refused, since nobody would pay for them.
_MOST_WAITING = 100_000
_LAST_SECONDS = 5.0


class Meter:
    """Writer of usage rows, within a running event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: deque[Mapping[str, Any]] = deque()
        metrics.API_USAGE_ROWS_WAITING.set_function(lambda: len(self._rows))
        self._closing = asyncio.Event()
        self._writer = asyncio.ensure_future(self._run())

    def check(self) -> None:
        """Check that there is room for another row.

        Raises:
            UpstreamUnavailable: so many rows wait that another one might be lost.
        """
        if len(self._rows) >= _MOST_WAITING:
            raise unreachable()

    def add(self, row: Mapping[str, Any]) -> None:
        """Queue the usage row of a request, with the columns of `usage.add_requests`."""
        self._rows.append(row)

    async def close(self) -> None:
        """Write the waiting rows; give up after five seconds without a database."""
        self._closing.set()
        await asyncio.wait((self._writer,), timeout=_LAST_SECONDS)
        if self._rows:
            log.error("usage_lost", rows=len(self._rows))

    async def _run(self) -> None:
        """Write rows until `close` was called and all are written. Nothing else writes any."""
        while self._rows or not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _PERIOD_SECONDS)
            try:
                await self._write()
            except Exception as error:  # noqa: BLE001 - whatever it is, the rows stay and the writer goes on
                metrics.API_DATABASE_FAILURES.inc()
                log.warning("usage_waits", rows=len(self._rows), error=type(error).__name__)
                await asyncio.sleep(_PERIOD_SECONDS)

    async def _write(self) -> None:
        while self._rows:
            rows = list(islice(self._rows, _BATCH))
            await self._database.ask(lambda connection: usage.add_requests(connection, rows))  # noqa: B023
            for _ in rows:
                self._rows.popleft()
