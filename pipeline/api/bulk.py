"""Corpora in and results out: what takes long, on threads and connections of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool

from pipeline.api.database import unreachable
from pipeline.errors import Busy
from pipeline.store.database import is_connection_lost, is_without_room

Found = TypeVar("Found")

#: A submission takes two connections, one of which renews its lease.
_AT_ONCE = 3
#: The others are for pages of results.
CONNECTIONS = 10
#: Uploads that may lie on disk, whole or in part.
UPLOADS_AT_ONCE = 6
#: How long another one waits for a place.
_UPLOAD_PATIENCE_SECONDS = 60.0


class Bulk:
    """However much of it there is, no short question waits for a thread or a connection."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bulk")
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)

    @asynccontextmanager
    async def upload(self) -> AsyncIterator[None]:
        """A place for an upload, from its first byte until nothing of it is left on disk.

        Raises:
            Busy: none became free in time.
        """
        try:
            async with asyncio.timeout(_UPLOAD_PATIENCE_SECONDS):
                await self._uploads.acquire()
        except TimeoutError as error:
            raise Busy("Too many uploads are under way; send it again.", retry_after_seconds=10) from error
        try:
            yield
        finally:
            self._uploads.release()

    async def run(self, act: Callable[[Engine], Found]) -> Found:
        """What `act` returns; it waits for its turn.

        Raises:
            UpstreamUnavailable: the database is away.
        """
        with _reporting_unreachable():
            return await asyncio.get_running_loop().run_in_executor(self._threads, act, self.engine)

    async def begin(self, make: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        """What `make` gives, once its first piece is there: what fails before can be answered. It isn't in the line of
        `run`, since it begins with short questions.

        Raises:
            UpstreamUnavailable: the database is away, or no connection was free in time.
        """
        with _reporting_unreachable():
            return await run_in_threadpool(_begun, make)

    def close(self) -> None:
        """Begin nothing more; what is under way is let go to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _begun(make: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    pieces = make()
    return chain([next(pieces, b"")], pieces)


@contextmanager
def _reporting_unreachable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise unreachable() from error
    except DBAPIError as error:
        if is_connection_lost(error) or is_without_room(error):
            raise unreachable() from error
        raise
