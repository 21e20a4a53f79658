"""Postgres queries off the event loop: transactions in threads, limited in number by workspace."""

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline.api.fair_semaphore import FairSemaphore
from pipeline.core.errors import Busy, UpstreamUnavailable
from pipeline.db import health
from pipeline.infra import metrics

log = structlog.get_logger()

#: Concurrent queries of callers, those of one workspace, and the api's own: keys, models, engines, usage.
_QUESTIONS, _QUESTIONS_OF_ONE, _OWN = 6, 4, 4
#: Size of the connection pool: one for each concurrent query, so that none waits for a connection.
AT_ONCE = _QUESTIONS + _OWN

Found = TypeVar("Found")


class Database:
    """Runner of transactions, each in a thread of its own.

    A frozen server blocks a thread for as long as it is frozen. Neither requests nor the process's shutdown wait for
    these threads.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._places, self._own = FairSemaphore(_QUESTIONS, _QUESTIONS_OF_ONE), asyncio.Semaphore(_OWN)
        self._failed = self._answered = float("-inf")
        #: Health check under way, shared by concurrent callers, since anybody may ask for one.
        self._answers: asyncio.Task[datetime] | None = None

    @property
    def seconds_since_failure(self) -> float:
        """Seconds since the last failure; infinite if there was none."""
        return time.monotonic() - self._failed

    def note_failure(self, error: BaseException) -> None:
        """Record that the database was unreachable."""
        metrics.API_DATABASE_FAILURES.inc()
        log.warning("database_unreachable", error=type(error).__name__)
        self._failed = time.monotonic()

    def note_late(self, seconds: float) -> UpstreamUnavailable | Busy:
        """Record a query that wasn't answered within so many seconds, and return the error for its caller.

        The database failed if it answered no query in that time. Otherwise this query's turn didn't come, or it
        takes long.
        """
        if time.monotonic() - self._answered > seconds:
            self.note_failure(TimeoutError())
            return unreachable()
        metrics.API_QUESTIONS_LATE.inc()
        return Busy("The gateway has too many database queries under way; try again.", retry_after_seconds=2)

    async def ask(self, act: Callable[[Connection], Found], workspace_id: int | None = None) -> Found:
        """Run `act` in a transaction when it is the turn of the workspace; without one, of the api itself.

        If the caller is cancelled, the transaction still runs to its end.
        """
        give_back = await self._take(workspace_id)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def end(found: Found | None, error: BaseException | None) -> None:
            give_back()
            if not isinstance(error, SQLAlchemyError):
                self._answered = time.monotonic()
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

    async def _take(self, workspace_id: int | None) -> Callable[[], None]:
        if workspace_id is not None:
            return await self._places.take(workspace_id)
        await self._own.acquire()
        return self._own.release

    async def answers_within(self, seconds: float) -> None:
        """Check that the database answers. Raises as `ask_within`."""
        if self._answers is None or self._answers.done():
            self._answers = asyncio.create_task(self.ask_within(seconds, health.now))
        await asyncio.shield(self._answers)

    async def ask_within(
        self, seconds: float, act: Callable[[Connection], Found], workspace_id: int | None = None
    ) -> Found:
        """Run `ask` with a timeout. The transaction may commit all the same after it.

        Raises:
            Busy: the timeout passed while other queries were answered.
            UpstreamUnavailable: the database is away, or answered no query in that time.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.ask(act, workspace_id)
        except SQLAlchemyError as error:
            self.note_failure(error)
            raise unreachable() from error
        except TimeoutError as error:
            raise self.note_late(seconds) from error


def unreachable() -> UpstreamUnavailable:
    """Return the error for a caller when the database is away."""
    return UpstreamUnavailable("The gateway's database can't be reached.", retry_after_seconds=2)
