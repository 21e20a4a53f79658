"""HTTP transport with one total deadline per request, so that a server trickling bytes cannot hold a worker.

It follows no redirection and reads no proxy from the environment: either would take a key elsewhere, or a signed event
past the operator's allowlist.
"""

import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import httpcore2 as httpcore

_PIECE_BYTES = 65_536

Headers = Iterable[tuple[str, str]]


def answered_status(
    method: str, url: str, *, seconds: float, headers: Headers = (), content: bytes | None = None
) -> int:
    """Send one request and return the status of its answer, whose body isn't read.

    Raises:
        httpcore2.TimeoutException: no answer came in time.
        Exception: the URL can't be reached, for any of the reasons that a URL may have.
    """
    deadlines = Deadlines()
    deadlines.end_at(time.monotonic() + seconds)
    # The library writes an IPv6 address without its brackets.
    host = urlsplit(url).netloc.rpartition("@")[2]
    sent = [("host", host), ("user-agent", "vectormill"), *headers]
    with (
        httpcore.ConnectionPool(network_backend=deadlines) as pool,
        pool.stream(method, url, headers=sent, content=content) as response,
    ):
        return response.status


def status_of(url: str, *, seconds: float, headers: Headers = ()) -> int | None:
    """Return the status that a server answers a GET with, or None if none comes, for whatever reason."""
    try:
        return answered_status("GET", url, seconds=seconds, headers=headers)
    except Exception:  # noqa: BLE001 - no name server, no certificate, no HTTP: none of them is an answer
        return None


class Deadlines(httpcore.NetworkBackend):
    """Network backend whose reads and writes, of headers and bodies, all end at the moment that the thread has set."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()
        self._thread = threading.local()

    def end_at(self, moment: float) -> None:
        """Set the deadline of this thread's next request, on the monotonic clock."""
        self._thread.moment = moment

    def left(self, most_seconds: float | None) -> float:
        """Return the seconds until the deadline, capped at `most_seconds`.

        Raises:
            httpcore2.ReadTimeout: it has passed.
        """
        left: float = self._thread.moment - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return left if most_seconds is None else min(left, most_seconds)

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *how: Any, **more: Any) -> "_Stream":
        """Connect to the first address that accepts. The look-up counts; each address gets a share of the time left."""
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        addresses = self._look_up(host, port)
        for others, address in zip(reversed(range(len(addresses))), addresses, strict=True):
            try:
                seconds = self.left(None) / (others + 1)
                seconds = seconds if timeout is None else min(seconds, timeout)
                return _Stream(self._inner.connect_tcp(address, port, seconds, *how, **more), self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed

    def _look_up(self, host: str, port: int) -> list[str]:
        """Return a host's addresses. A resolver takes no timeout: one that is late is left running in its thread."""
        found: Future[list[str]] = Future()

        def look_up() -> None:
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found.set_result(list(dict.fromkeys(str(info[4][0]) for info in infos)))
            except Exception as error:  # noqa: BLE001 - the caller's
                found.set_exception(error)

        threading.Thread(target=look_up, name="look-up", daemon=True).start()
        try:
            return found.result(self.left(None))
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadlines: Deadlines) -> None:
        self._inner, self._deadlines = inner, deadlines

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadlines.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE_BYTES):
            self._inner.write(buffer[start : start + _PIECE_BYTES], self._deadlines.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        seconds = self._deadlines.left(timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, seconds), self._deadlines)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
