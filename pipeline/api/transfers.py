"""Corpora in and results out: what takes long, on threads and connections of its own."""

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
from pipeline.api.places import Places
from pipeline.core.errors import Busy
from pipeline.db.database import is_connection_lost, is_without_room

Found = TypeVar("Found")

#: What runs at a time, and of one workspace. A submission takes two connections, one of which renews its lease.
_AT_ONCE, _OF_ONE_AT_ONCE = 3, 2
#: The others are for pages of results.
CONNECTIONS = 10
#: Uploads that may lie on disk, whole or in part, and those of one workspace.
UPLOADS_AT_ONCE, UPLOADS_OF_ONE = 6, 3
#: Larger bodies than this are read so many at a time, and so many of one workspace: they are held in memory, and a
#: client may take long to send one.
_SMALL_BYTES = 65_536
BODIES_AT_ONCE, BODIES_OF_ONE = 32, 16
#: Answers that are made while they are sent: each holds a page of vectors for as long as its reader takes.
_DOWNLOADS_AT_ONCE, DOWNLOADS_OF_ONE = 16, 8
#: How long another one waits for a place.
_PATIENCE_SECONDS = 60.0


class Transfers:
    """However much of it there is, no short question waits for a thread or a connection; and whatever a workspace
    sends or reads, places are left for others."""

    def __init__(self, engine: Engine, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self.engine = engine
        self._patience_seconds = patience_seconds
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="transfers")
        self._runs = Places(_AT_ONCE, _OF_ONE_AT_ONCE)
        self._uploads = Places(UPLOADS_AT_ONCE, UPLOADS_OF_ONE)
        self._downloads = Places(_DOWNLOADS_AT_ONCE, DOWNLOADS_OF_ONE)
        self._bodies = Places(BODIES_AT_ONCE, BODIES_OF_ONE)

    async def body(self, request: Request, workspace_id: int) -> bytes:
        """A request's body, read into memory when it is the workspace's turn, if it isn't a small one.

        Raises:
            Busy: its turn didn't come in time.
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
        """A place for an upload, from its first byte until nothing of it is left on disk.

        Raises:
            Busy: none became free in time.
        """
        give_back = await self._take(self._uploads, workspace_id, "uploads")
        try:
            yield
        finally:
            give_back()

    async def _take(self, places: Places, workspace_id: int, what: str) -> Callable[[], None]:
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await places.take(workspace_id)
        except TimeoutError as error:
            raise Busy(f"Too many {what} are under way; send it again.", retry_after_seconds=10) from error

    async def run(self, workspace_id: int, act: Callable[[Engine], Found]) -> Found:
        """What `act` returns; it waits for its turn.

        Raises:
            UpstreamUnavailable: the database is away.
        """
        give_back = await self._runs.take(workspace_id)
        done = asyncio.get_running_loop().run_in_executor(self._threads, act, self.engine)
        done.add_done_callback(lambda _: give_back())
        with _reporting_unreachable():
            return await asyncio.shield(done)

    async def answer(self, workspace_id: int, make: Callable[[], Iterator[bytes]], **how: Any) -> StreamingResponse:
        """An answer of what `make` gives, once its first piece is there: what fails before can be told. It isn't in
        the line of `run`, since it begins with short questions.

        Args:
            how: what else `StreamingResponse` takes.

        Raises:
            Busy: the workspace's readers, or all, have taken every place, or no connection was free in time.
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
        """Begin nothing more; what is under way is let go to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Held(StreamingResponse):
    """An answer that holds a place until it is sent, or its reader has gone."""

    def __init__(self, pieces: Iterator[bytes], give_back: Callable[[], None], **how: Any) -> None:
        super().__init__(pieces, **how)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
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
    except PoolTimeout as error:  # our own line, not the database
        message = "The gateway has too many questions for its database; try again."
        raise Busy(message, retry_after_seconds=2) from error
    except DBAPIError as error:
        if is_connection_lost(error) or is_without_room(error):
            raise unreachable() from error
        raise
