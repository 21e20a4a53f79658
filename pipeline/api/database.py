"""Postgres, asked from an event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline.api.places import Places
from pipeline.core.errors import Busy, UpstreamUnavailable
from pipeline.db import health
from pipeline.infra import metrics

log = structlog.get_logger()

#: Questions of callers at a time, and those of one workspace; and our own: keys, models, engines, usage.
_QUESTIONS, _QUESTIONS_OF_ONE, _OWN = 6, 4, 4
#: As many as the pool has connections, so that none waits for one.
AT_ONCE = _QUESTIONS + _OWN

Found = TypeVar("Found")


class Database:
    """Runs transactions in threads of their own. A server that is frozen keeps a thread for as long as it is: nobody
    waits for the threads, neither a request nor the end of the process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._places, self._own = Places(_QUESTIONS, _QUESTIONS_OF_ONE), asyncio.Semaphore(_OWN)
        self._failed = self._answered = float("-inf")
        #: Whether it answers: one question for all who ask at a time, since anybody may.
        self._answers: asyncio.Task[datetime] | None = None

    @property
    def seconds_since_failure(self) -> float:
        """Infinite: there was none."""
        return time.monotonic() - self._failed

    def note_failure(self, error: BaseException) -> None:
        """It was away."""
        metrics.API_DATABASE_FAILURES.inc()
        log.warning("database_unreachable", error=type(error).__name__)
        self._failed = time.monotonic()

    def note_late(self, seconds: float) -> UpstreamUnavailable | Busy:
        """A question wasn't answered within so many seconds. It is the database's failure if it answered none in that
        time; else that question's turn didn't come, or it takes long. Returns what a caller is told."""
        if time.monotonic() - self._answered > seconds:
            self.note_failure(TimeoutError())
            return unreachable()
        metrics.API_QUESTIONS_LATE.inc()
        return Busy("The gateway has too many questions for its database; try again.", retry_after_seconds=2)

    async def ask(self, act: Callable[[Connection], Found], workspace_id: int | None = None) -> Found:
        """Run `act` in a transaction when it is a workspace's turn, by default ours. A caller that is
        cancelled leaves it to its end."""
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
        """Return if it answers. Raises as `ask_within`."""
        if self._answers is None or self._answers.done():
            self._answers = asyncio.create_task(self.ask_within(seconds, health.now))
        await asyncio.shield(self._answers)

    async def ask_within(
        self, seconds: float, act: Callable[[Connection], Found], workspace_id: int | None = None
    ) -> Found:
        """As `ask`, but not for longer than so many seconds; what `act` does may come to pass all the same.

        Raises:
            Busy: it took longer, while others were answered.
            UpstreamUnavailable: the database is away, or answered nobody in that time.
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
    """What a caller is told."""
    return UpstreamUnavailable("The gateway's database can't be reached.", retry_after_seconds=2)
