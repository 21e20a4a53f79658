"""Uploads of corpora and downloads of results: long work, on threads and connections of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from pipeline.api.database import unreachable
from pipeline.api.fair_semaphore import FairSemaphore
from pipeline.core.errors import Busy
from pipeline.db.database import is_connection_lost, is_without_room

Found = TypeVar("Found")

#: Concurrent runs, and those of one workspace. A submission takes two connections, one of which renews its lease.
_AT_ONCE, _OF_ONE_AT_ONCE = 3, 2
#: Size of the connection pool. Runs take six at most; the others are for pages of results.
CONNECTIONS = 10
#: Uploads that may be on disk at a time, whole or in part, and those of one workspace.
UPLOADS_AT_ONCE, UPLOADS_OF_ONE = 6, 3
#: Limit on larger bodies that are read at a time, and on those of one workspace: they are held in memory, and a client
#: may take long to send one.
_SMALL_BYTES = 65_536
BODIES_AT_ONCE, BODIES_OF_ONE = 32, 16
#: Concurrent streamed answers, and those of one workspace: each holds a page of vectors as long as its reader takes.
_DOWNLOADS_AT_ONCE, DOWNLOADS_OF_ONE = 16, 8
#: Timeout of waiting for a place.
_PATIENCE_SECONDS = 60.0


class Transfers:
    """Threads, connections and places for long work.

    No short query waits for a thread or a connection because of it, and no workspace can take every place.
    """

    def __init__(self, engine: Engine, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self.engine = engine
        self._patience_seconds = patience_seconds
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="transfers")
        self._runs = FairSemaphore(_AT_ONCE, _OF_ONE_AT_ONCE)
        self._uploads = FairSemaphore(UPLOADS_AT_ONCE, UPLOADS_OF_ONE)
        self._downloads = FairSemaphore(_DOWNLOADS_AT_ONCE, DOWNLOADS_OF_ONE)
        self._bodies = FairSemaphore(BODIES_AT_ONCE, BODIES_OF_ONE)

    async def body(self, request: Request, workspace_id: int) -> bytes:
        """Read a request's body into memory. A large one waits for a place of its workspace.

        Raises:
            Busy: no place became free in time.
        """
        told = request.headers.get("content-length", "")
        if told.isdecimal() and int(told) <= _SMALL_BYTES and "content-encoding" not in request.headers:
            return await request.body()
        give_back = await self._take(self._bodies, workspace_id, "large requests")
        try:
            return await request.body()
        finally:
            give_back()

    @asynccontextmanager
    async def upload(self, workspace_id: int) -> AsyncIterator[None]:
        """Hold a place for an upload, from its first byte until nothing of it is left on disk.

        Raises:
            Busy: no place became free in time.
        """
        give_back = await self._take(self._uploads, workspace_id, "uploads")
        try:
            yield
        finally:
            give_back()

    async def _take(self, places: FairSemaphore, workspace_id: int, what: str) -> Callable[[], None]:
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await places.take(workspace_id)
        except TimeoutError as error:
            raise Busy(f"Too many {what} are under way; send it again.", retry_after_seconds=10) from error

    async def run(self, workspace_id: int, act: Callable[[Engine], Found]) -> Found:
        """Run `act` on a thread when it is the workspace's turn, and return its result.

        Raises:
            Busy: no connection was free in time.
            UpstreamUnavailable: the database is away.
        """
        give_back = await self._runs.take(workspace_id)
        done = asyncio.get_running_loop().run_in_executor(self._threads, act, self.engine)
        done.add_done_callback(lambda _: give_back())
        with _reporting_unreachable():
            return await asyncio.shield(done)

    async def answer(self, workspace_id: int, make: Callable[[], Iterator[bytes]], **how: Any) -> StreamingResponse:
        """Stream what `make` yields, once the first piece is there: an error before it can still be answered.

        It doesn't wait in the queue of `run`, since it begins with short queries.

        Args:
            how: other arguments of `StreamingResponse`.

        Raises:
            Busy: no place became free in time, in all or of the workspace, or no connection did.
            UpstreamUnavailable: the database is away.
        """
        give_back = await self._take(self._downloads, workspace_id, "downloads")
        try:
            with _reporting_unreachable():
                pieces = await run_in_threadpool(_begun, make)
        except BaseException:
            give_back()
            raise
        return _Held(pieces, give_back, **how)

    def close(self) -> None:
        """Cancel the queued runs. Runs under way go on to their end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Held(StreamingResponse):
    """Streaming response that holds a place until it is sent, or its reader has gone."""

    def __init__(self, pieces: Iterator[bytes], give_back: Callable[[], None], **how: Any) -> None:
        super().__init__(pieces, **how)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_back()


def _begun(make: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    pieces = make()
    return chain([next(pieces, b"")], pieces)


@contextmanager
def _reporting_unreachable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:  # our own pool is full; the database isn't away
        message = "The gateway has too many database queries under way; try again."
        raise Busy(message, retry_after_seconds=2) from error
    except DBAPIError as error:
        if is_connection_lost(error) or is_without_room(error):
            raise unreachable() from error
        raise
