"""HTTP whose every step ends at a moment that is set for all of it: who sends a byte now and then doesn't hold it."""

import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpcore2 as httpcore

_PIECE_BYTES = 65_536


class Deadlines(httpcore.NetworkBackend):
    """Connections whose every read and write, of bodies and of headers, ends at the moment that the thread has set."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()
        self._thread = threading.local()

    def end_at(self, moment: float) -> None:
        """What this thread does next ends at this moment of the monotonic clock."""
        self._thread.moment = moment

    def left(self, most_seconds: float | None) -> float:
        """Seconds until then, at most so many. Raises `httpcore.ReadTimeout`."""
        left: float = self._thread.moment - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return left if most_seconds is None else min(left, most_seconds)

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *how: Any, **more: Any) -> "_Stream":
        """As the library's, with the look-up of the name, within the time."""
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in self._look_up(host, port):
            try:
                return _Stream(self._inner.connect_tcp(address, port, self.left(timeout), *how, **more), self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed

    def _look_up(self, host: str, port: int) -> list[str]:
        """A host's addresses. No resolver can be told how long it may take: one that takes longer is left to itself."""
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
