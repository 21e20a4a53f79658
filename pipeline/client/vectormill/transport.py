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
from .rows import files_of, sources_of

if TYPE_CHECKING:
    import httpx2 as httpx

T = TypeVar("T")
#: Arguments of httpx's `request`.
_Request: TypeAlias = dict[str, Any]

_CONNECT_SECONDS = 5.0
#: An upload is answered once all its items are in the database.
_MOST_SECONDS = 3_600.0
_TRIES = 4
_LONGEST_PAUSE_SECONDS = 30.0
#: Statuses of what may succeed soon: too many requests, and a server behind the api that is away.
_COME_AGAIN = (429, 502, 503, 504)


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
        try:
            record = json.loads((place / "run" / "up.json").read_text())
            os.kill(record["supervisor_pid"], 0)
            if record["ready"]:
                return record["api_url"], record["api_key"]
        except (OSError, ValueError, KeyError):
            continue
    raise ServiceUnreachable(
        "no vectormill runs here; start it with `vectormill up --detach`, or give the url and a key of an api."
    )


def _settings(url: str, key: str, workspace: str | None) -> dict[str, Any]:
    import httpx2 as httpx

    return {
        "base_url": f"{url.rstrip('/')}/api",
        "headers": {"authorization": f"Bearer {key}"},
        "params": {"workspace": workspace} if workspace else {},
        "timeout": httpx.Timeout(_MOST_SECONDS, connect=_CONNECT_SECONDS),
    }


def _request(call: Call[Any], files: Sequence[Path], opened: ExitStack) -> _Request:
    how: _Request = {"method": call.method, "url": call.path, "params": dict(call.params), "headers": {}}
    if call.key:
        how["headers"]["idempotency-key"] = call.key
    if files:
        how["data"] = call.form()
        how["files"] = [("file", (path.name, opened.enter_context(path.open("rb")))) for path in files]
    elif call.body is not None:
        sources = {"sources": found} if (found := sources_of(call.data)) else {}
        how["json"] = {**call.body, **sources}
    return how


def _check(reply: "httpx.Response") -> None:
    """Raise the error that an answer describes; do nothing if it is none."""
    if reply.is_success:
        return
    problem: dict[str, Any] = {}
    try:
        problem = reply.json()
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"the api answers {reply.status_code}."
    if reply.status_code in _COME_AGAIN:
        raise ServiceUnreachable(detail)
    if reply.status_code >= 500:
        raise VectormillError(detail)
    kind = {401: KeyRefused, 403: KeyRefused, 404: NotFound}.get(reply.status_code, UserError)
    if problem.get("title") == "collection busy":
        kind = CollectionBusy
    raise kind(detail, field=problem.get("field"), status=reply.status_code)


def _pause(reply: "httpx.Response | Exception", attempt: int) -> float | None:
    """Return the seconds until a call is sent again; `None`: it isn't."""
    if isinstance(reply, Exception):
        told = ""
    elif reply.status_code in _COME_AGAIN:
        told = reply.headers.get("retry-after", "")
    else:
        return None
    if attempt + 1 == _TRIES:
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
        pause = _pause(reply, attempt)
        if pause is None:
            break
        yield pause
        attempt += 1
    if isinstance(reply, Exception):
        raise _lost(url, reply) from reply
    _check(reply)
    return call.read(reply.json() if reply.content else None)


def _files(call: Call[Any], folder: str) -> list[Path]:
    return [] if call.data is None or sources_of(call.data) else files_of(call.data, Path(folder))


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
        try:
            with self._client.stream("GET", path, params=params) as reply:
                if not reply.is_success:
                    reply.read()
                _check(reply)
                yield reply
        except self._lost as error:
            raise _lost(self.url, error) from error


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
        try:
            async with self._client.stream("GET", path, params=params) as reply:
                if not reply.is_success:
                    await reply.aread()
                _check(reply)
                yield reply
        except self._lost as error:
            raise _lost(self.url, error) from error
