"""Corpora in and results out: what takes long, on threads and connections of its own."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool

from pipeline.api.database import unreachable
from pipeline.store.database import is_connection_lost

Found = TypeVar("Found")

#: A submission takes two connections, one of which renews its lease.
_AT_ONCE = 3
#: The others are for pages of results.
CONNECTIONS = 10


class Bulk:
    """However much of it there is, no short question waits for a thread or a connection."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bulk")

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
        if is_connection_lost(error):
            raise unreachable() from error
        raise
