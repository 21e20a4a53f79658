"""Usage rows of requests, written within a quarter of a second behind their replies: see ops/decisions/0006."""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from pipeline.errors import UpstreamUnavailable
from pipeline.store import usage

log = structlog.get_logger()

_PERIOD_SECONDS = 0.25
_BATCH = 1_000
#: Rows that wait for a database that is away; then requests are refused, since nobody would pay for them.
_MOST_WAITING = 100_000
_LAST_TRIES = 20


class Meter:
    """Writes usage rows, within a running event loop."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._rows: deque[Mapping[str, Any]] = deque()
        self._writer = asyncio.ensure_future(self._run())

    def check(self) -> None:
        """Raises:
        UpstreamUnavailable: so many rows wait that another one might be lost.
        """
        if len(self._rows) >= _MOST_WAITING:
            raise UpstreamUnavailable("The gateway's database can't be reached.", retry_after_seconds=5)

    def add(self, row: Mapping[str, Any]) -> None:
        """Note a request: the columns of `usage.add_requests`."""
        self._rows.append(row)

    async def close(self) -> None:
        """Write what waits; give up after five seconds without a database."""
        self._writer.cancel()
        with suppress(asyncio.CancelledError):
            await self._writer
        for _ in range(_LAST_TRIES):
            if await self._write():
                return
            await asyncio.sleep(_PERIOD_SECONDS)
        log.error("usage_lost", rows=len(self._rows))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_SECONDS)
            # A cancelled write may arrive all the same: it is never cut off.
            await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> bool:
        """Write all that waits. False: the database is away."""
        while self._rows:
            rows = [self._rows[n] for n in range(min(_BATCH, len(self._rows)))]
            try:
                await asyncio.to_thread(self._insert, rows)
            except DBAPIError as error:
                log.warning("usage_waits", rows=len(self._rows), error=type(error).__name__)
                return False
            for _ in rows:
                self._rows.popleft()
        return True

    def _insert(self, rows: list[Mapping[str, Any]]) -> None:
        with self._database.begin() as connection:
            usage.add_requests(connection, rows)
