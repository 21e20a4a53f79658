"""Transport: sends calls to an api, again where that may help, and raises what it answers as errors."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from .calls import Call
from .errors import CollectionBusy, KeyRefused, NotFound, ServiceUnreachable, UserError, VectormillError
from .rows import files_of, source_of

if TYPE_CHECKING:
    import httpx2 as httpx

T = TypeVar("T")
#: Arguments of httpx's `request`.
_Request: TypeAlias = dict[str, Any]

_CONNECT_SECONDS = 5.0
#: Longer than a search waits in an engine's queue.
_READ_SECONDS = 180.0
#: The same of what takes long: an upload is answered once all its items are in the database.
_MOST_SECONDS = 3_600.0
_TRIES = 4
_LONGEST_PAUSE_SECONDS = 30.0
#: Time between two tries to begin a sync while another one goes on.
_BUSY_SECONDS = 2.0
#: Answers of an api that hasn't done it, and of balancers, after which nobody knows.
_NOT_DONE, _UNKNOWN = (429, 503), (502, 504)


def local_api() -> tuple[str, str]:
    """Return the URL and key of the `vectormill up` that runs here: of VECTORMILL_HOME, else of the nearest
    `.vectormill` in this folder or above it, or in the user's own.

    Raises:
        ServiceUnreachable: none runs.
    """
    home = os.environ.get("VECTORMILL_HOME")
    here = Path.cwd()
    homes = [Path(home)] if home else [folder / ".vectormill" for folder in (here, *here.parents, Path.home())]
    for place in homes:
        if record := _running(place):
            return record["api_url"], record["api_key"]
    raise ServiceUnreachable(
        "no vectormill runs here; start it with `vectormill up --detach`, or give the url and a key of an api."
    )


def _running(home: Path) -> dict[str, Any] | None:
    """Return a home's record if its `up` is ready. One that somebody else may have written doesn't count: rows are
    sent where it says."""
    import psutil

    path = home / "run" / "up.json"
    try:
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        if Path(record["home"]).resolve() != home.resolve() or not record["ready"]:
            return None
        # As processes' ids are given again, the start counts too: since the machine's, since clocks are set.
        began = psutil.Process(record["supervisor_pid"]).create_time() - psutil.boot_time()
        return record if abs(began - record["supervisor_started"]) < 1 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _settings(url: str, key: str, workspace: str | None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise UserError(f'the url "{url}" begins with neither http:// nor https://.', field="url")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the key holds what no key has; was it copied whole?", field="key")
    import httpx2 as httpx

    return {
        "base_url": f"{url.rstrip('/')}/api",
        "headers": {"authorization": f"Bearer {key}"},
        "params": {"workspace": workspace} if workspace else {},
        # Of downloads; `_request` sets that of calls.
        "timeout": httpx.Timeout(_MOST_SECONDS, connect=_CONNECT_SECONDS),
    }


def _request(call: Call[Any], files: Sequence[Path], opened: ExitStack) -> _Request:
    import httpx2 as httpx

    how: _Request = {"method": call.method, "url": call.path, "params": dict(call.params), "headers": {}}
    how["timeout"] = httpx.Timeout(_MOST_SECONDS if call.takes_long else _READ_SECONDS, connect=_CONNECT_SECONDS)
    if call.key:
        how["headers"]["idempotency-key"] = call.key
    if files:
        how["data"] = call.form()
        how["files"] = [("file", (path.name, opened.enter_context(path.open("rb")))) for path in files]
    elif call.body is not None:
        sources = {"sources": [found]} if (found := source_of(call.data)) else {}
        how["json"] = {**call.body, **sources}
    return how


def _answer(reply: "httpx.Response") -> Any:
    """Return an answer's JSON; `None`: it has none.

    Raises: the error that it describes.
    """
    try:
        found = reply.json() if reply.content else None
    except ValueError:
        if reply.is_success:
            raise VectormillError("the answer isn't an api's; is the url right?") from None
        found = None
    if reply.is_success:
        return found
    problem = found if isinstance(found, dict) else {}
    detail = str(problem.get("detail") or f"the api answers {reply.status_code}.")
    if reply.status_code in (*_NOT_DONE, *_UNKNOWN):
        raise ServiceUnreachable(detail)
    if reply.status_code >= 500:
        raise VectormillError(detail)
    kind = {401: KeyRefused, 403: KeyRefused, 404: NotFound}.get(reply.status_code, UserError)
    if problem.get("title") == "collection busy":
        kind = CollectionBusy
    raise kind(detail, field=problem.get("field"), status=reply.status_code)


def _pause(reply: "httpx.Response | Exception", attempt: int, *, repeatable: bool = True) -> float | None:
    """Return the seconds until a call is sent again; `None`: it isn't. One that isn't `repeatable` is only sent again
    if it surely hasn't been carried out."""
    import httpx2 as httpx

    told = ""
    if isinstance(reply, Exception):
        again = repeatable or isinstance(reply, httpx.ConnectError | httpx.ConnectTimeout)
    else:
        again = reply.status_code in _NOT_DONE or (repeatable and reply.status_code in _UNKNOWN)
        told = reply.headers.get("retry-after", "")
    if not again or attempt + 1 == _TRIES:
        return None
    return min(float(told) if told.isdecimal() else 0.5 * 2**attempt, _LONGEST_PAUSE_SECONDS)


def _exchange(call: Call[T], files: Sequence[Path], url: str) -> Generator["_Request | float", Any, T]:
    """Yield requests, each for its reply or for the error that kept it away, and pauses in seconds; return the answer.

    Raises: the error that the api answers, or `ServiceUnreachable`.
    """
    attempt = 0
    while True:
        with ExitStack() as opened:
            reply = yield _request(call, files, opened)
        if (pause := _pause(reply, attempt, repeatable=call.repeatable)) is not None:
            attempt += 1
            yield pause
            continue
        if isinstance(reply, Exception):
            raise _lost(url, reply) from reply
        try:
            return call.read(_answer(reply))
        except CollectionBusy:
            if not call.queues:
                raise
        # The rows that were written to files are sent again: a cursor or an iterator has none left.
        yield _BUSY_SECONDS


def _files(call: Call[Any], folder: str) -> list[Path]:
    return [] if call.data is None or source_of(call.data) else files_of(call.data, Path(folder))


def _lost(url: str, error: Exception) -> ServiceUnreachable:
    return ServiceUnreachable(f"can't reach the api at {url} ({type(error).__name__}).")


class Transport:
    """Transport that blocks."""

    def __init__(self, url: str, key: str, workspace: str | None) -> None:
        import httpx2 as httpx

        self.url, self._lost = url, httpx.TransportError
        self._client = httpx.Client(**_settings(url, key, workspace))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def send(self, call: Call[T]) -> T:
        """Send a call, and return what its answer says.

        Raises: the error that the api answers, or `ServiceUnreachable`.
        """
        with TemporaryDirectory(prefix="vectormill-") as folder:
            exchange = _exchange(call, _files(call, folder), self.url)
            reply = None
            try:
                while True:
                    step = exchange.send(reply)
                    if isinstance(step, float):
                        time.sleep(step)
                        reply = None
                    else:
                        reply = self._try(step)
            except StopIteration as done:
                return done.value

    def _try(self, request: _Request) -> Any:
        try:
            return self._client.request(**request)
        except self._lost as error:
            return error

    @contextmanager
    def stream(self, path: str, **params: Any) -> Iterator["httpx.Response"]:
        """Open an answer that is streamed. Raises as `send`."""
        attempt = 0
        while (pause := _pause(reply := self._open(path, params), attempt)) is not None:
            if not isinstance(reply, Exception):
                reply.close()
            time.sleep(pause)
            attempt += 1
        if isinstance(reply, Exception):
            raise _lost(self.url, reply) from reply
        try:
            if not reply.is_success:
                reply.read()
                _answer(reply)
            yield reply
        except self._lost as error:
            raise _lost(self.url, error) from error
        finally:
            reply.close()

    def _open(self, path: str, params: dict[str, Any]) -> "httpx.Response | Exception":
        try:
            return self._client.send(self._client.build_request("GET", path, params=params), stream=True)
        except self._lost as error:
            return error


class AsyncTransport:
    """Transport that awaits."""

    def __init__(self, url: str, key: str, workspace: str | None) -> None:
        import httpx2 as httpx

        self.url, self._lost = url, httpx.TransportError
        self._client = httpx.AsyncClient(**_settings(url, key, workspace))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a call, and return what its answer says. Raises as `Transport.send`."""
        with TemporaryDirectory(prefix="vectormill-") as folder:
            exchange = _exchange(call, await asyncio.to_thread(_files, call, folder), self.url)
            reply = None
            try:
                while True:
                    step = exchange.send(reply)
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                        reply = None
                    else:
                        reply = await self._try(step)
            except StopIteration as done:
                return done.value

    async def _try(self, request: _Request) -> Any:
        try:
            return await self._client.request(**request)
        except self._lost as error:
            return error

    @asynccontextmanager
    async def stream(self, path: str, **params: Any) -> AsyncIterator["httpx.Response"]:
        """Open an answer that is streamed. Raises as `Transport.send`."""
        attempt = 0
        while (pause := _pause(reply := await self._open(path, params), attempt)) is not None:
            if not isinstance(reply, Exception):
                await reply.aclose()
            await asyncio.sleep(pause)
            attempt += 1
        if isinstance(reply, Exception):
            raise _lost(self.url, reply) from reply
        try:
            if not reply.is_success:
                await reply.aread()
                _answer(reply)
            yield reply
        except self._lost as error:
            raise _lost(self.url, error) from error
        finally:
            await reply.aclose()

    async def _open(self, path: str, params: dict[str, Any]) -> "httpx.Response | Exception":
        try:
            return await self._client.send(self._client.build_request("GET", path, params=params), stream=True)
        except self._lost as error:
            return error
