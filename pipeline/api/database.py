"""Postgres, asked from an event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline import metrics
from pipeline.errors import UpstreamUnavailable

log = structlog.get_logger()

#: Questions at a time: as many as the pool has connections, so that none waits for one.
AT_ONCE = 8

Found = TypeVar("Found")


class Database:
    """Runs transactions in threads of their own. A server that is frozen keeps a thread for as long as it is: nobody
    waits for the threads, neither a request nor the end of the process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._places = asyncio.Semaphore(AT_ONCE)
        self._failed = float("-inf")

    @property
    def seconds_since_failure(self) -> float:
        """Infinite: there was none."""
        return time.monotonic() - self._failed

    def note_failure(self, error: BaseException) -> None:
        """It was away, or didn't answer in time."""
        metrics.API_DATABASE_FAILURES.inc()
        log.warning("database_unreachable", error=type(error).__name__)
        self._failed = time.monotonic()

    async def ask(self, act: Callable[[Connection], Found]) -> Found:
        """What `act` returns, in a transaction. A caller that is cancelled leaves it to its end."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def end(found: Found | None, error: BaseException | None) -> None:
            self._places.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(found)  # type: ignore[arg-type]
            else:
                answer.set_exception(error)

        def run() -> None:
            found, error = None, None
            try:
                with self._engine.begin() as connection:
                    found = act(connection)
            except BaseException as raised:  # noqa: BLE001 - the caller gets it
                error = raised
            try:
                loop.call_soon_threadsafe(end, found, error)
            except RuntimeError:  # the loop has been closed meanwhile
                log.debug("nobody_waits")

        threading.Thread(target=run, name="database", daemon=True).start()
        return await answer

    async def ask_within(self, seconds: float, act: Callable[[Connection], Found]) -> Found:
        """As `ask`, but not for longer than so many seconds; what `act` does may come to pass all the same.

        Raises:
            UpstreamUnavailable: the database is away, or didn't answer in time.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.ask(act)
        except (SQLAlchemyError, TimeoutError) as error:
            self.note_failure(error)
            raise unreachable() from error


def unreachable() -> UpstreamUnavailable:
    """What a caller is told."""
    return UpstreamUnavailable("The gateway's database can't be reached.", retry_after_seconds=2)
