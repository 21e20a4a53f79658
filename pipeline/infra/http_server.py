"""The HTTP server of api and engine: uvicorn's, with bounds for clients that are slow on purpose, or too many.

uvicorn limits how long a connection idles after a request, and nothing else: a head that is never ended, or an answer
that is never read, would be waited for without end.
"""

import asyncio
import resource
import signal
import socket
import time
from collections import Counter as Count
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any, cast

import uvicorn
from prometheus_client import Counter
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: How long a connection may idle between requests.
KEEP_ALIVE_SECONDS = 75
#: From a connection's opening, or a request's first byte, to the end of its head.
HEAD_SECONDS = 30.0
#: The most bytes of a head, or of what comes after a body.
HEAD_BYTES = 65_536
#: Of an answer that waits to be read, so much is taken in so long; else the client is given up.
TAKEN_BYTES = 65_536
TAKEN_SECONDS = 120.0
#: Connections at a time, where as many files may be open.
CONNECTIONS = 2_000
#: Files that are open for other things.
_OTHER_FILES = 256
#: Where a request's state holds its connection's `Turn`.
TURN = "turn"
#: A request that is passed on, to an engine or a gateway, takes a second one.
_FILES_EACH = 2

_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"


class Turn:
    """Lets a connection's request wait, until its client goes away or the server ends."""

    def __init__(self) -> None:
        self.is_awaited = False
        self._is_gone = False
        self._over = asyncio.Event()

    async def come(self, seconds: float) -> bool:
        """Wait so long. Returns whether the client is still there."""
        self.is_awaited = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        self.is_awaited = False
        return not self._is_gone

    def end(self, *, gone: bool) -> None:
        """Let nothing of the connection wait any longer."""
        self._is_gone |= gone
        self._over.set()


class BoundedConnection(HttpToolsProtocol):
    """A connection whose client must get on. Attributes of a class made by `bounded` say what is counted."""

    most = CONNECTIONS
    head_seconds = HEAD_SECONDS
    taken_seconds = TAKEN_SECONDS
    closed: Counter

    _head_timer: asyncio.TimerHandle | None = None
    _taking_timer: asyncio.TimerHandle | None = None
    #: Bytes since the last of a head or a body.
    _unparsed = 0
    _unread = 0
    _in_head = False

    @property
    def waits(self) -> bool:
        """Return whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place; where there is none, that of a connection that waits."""
        super().connection_made(transport)
        self.opened, self.turn = time.monotonic(), Turn()
        self._expect_head()
        self._taking_timer = self.loop.call_later(self.taken_seconds, self._check_taking)
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers, and what waits."""
        self.turn.end(gone=True)
        self._forget_head()
        if self._taking_timer:
            self._taking_timer.cancel()
        # uvicorn's own ends with an orderly goodbye only.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and bound what isn't a body."""
        self._unparsed += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unparsed > HEAD_BYTES:
            self._end("head_too_large", _TOO_LARGE)
        elif self.waits:
            self._expect_head()

    def on_message_begin(self) -> None:
        """A head begins, it may be while the request before it is under way."""
        self._in_head = True
        super().on_message_begin()
        self.scope["state"][TURN] = self.turn

    def on_headers_complete(self) -> None:
        """A request begins."""
        self._unparsed, self._unread, self._in_head = 0, 0, False
        self._forget_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self._unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """A head that has begun meanwhile has its time from now on."""
        super().on_response_complete()
        if self._in_head:
            self._expect_head()

    def shutdown(self) -> None:
        """End when what is under way is answered, which is now."""
        self.turn.end(gone=False)
        super().shutdown()

    def resume_writing(self) -> None:
        """The client has read what waited."""
        self._unread = 0
        super().resume_writing()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._end, "slow_head", _TIMEOUT)

    def _forget_head(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _check_taking(self) -> None:
        """Give a client up that doesn't read what waits for it."""
        # While more may be written the size says nothing.
        still = self.waits or self.flow.write_paused or self.transport.is_closing()
        unread = self.transport.get_write_buffer_size() if still else 0
        if unread and self._unread and unread > self._unread - TAKEN_BYTES:
            self.drop("slow_reader")
            return
        self._unread = unread
        self._taking_timer = self.loop.call_later(self.taken_seconds, self._check_taking)

    def _make_room(self) -> None:
        """Drop a connection of the client that has the most: one between requests, or that waits for its turn, first
        those that never asked for anything, then those that have been there longest; else the latest whose body is
        still to come."""
        others = [cast(BoundedConnection, other) for other in self.connections if other is not self]
        if waiting := [other for other in others if other.waits or other.turn.is_awaited]:
            crowd = Count(map(_network, waiting))
            dropped = max(waiting, key=lambda other: (crowd[_network(other)], other.cycle is None, -other.opened))
        elif sending := [other for other in others if other.cycle.more_body]:
            crowd = Count(map(_network, sending))
            dropped = max(sending, key=lambda other: (crowd[_network(other)], other.opened))
        else:
            self._end("full", _FULL)
            return
        dropped.drop("full")

    def _end(self, reason: str, answer: bytes) -> None:
        """Close with an answer, where one is still expected."""
        if not self.transport.is_closing():
            self.closed.labels(reason).inc()
            self.transport.write(answer)
            self.transport.close()

    def drop(self, reason: str) -> None:
        """Close at once, whatever waits to be sent."""
        self.closed.labels(reason).inc()
        self.connections.discard(self)
        self.transport.abort()


def _network(connection: BoundedConnection) -> str:
    return network_of(connection.client[0]) if connection.client else ""


@lru_cache(4_096)
def network_of(host: str) -> str:
    """A client's address; of IPv6 the network, in which one machine may have any number of addresses."""
    try:
        address = ip_address(host)
    except ValueError:  # a socket's path, or a name that a balancer tells
        return host
    if isinstance(address, IPv4Address) or address.ipv4_mapped:
        return host
    return str(IPv6Network((int(address), 64), strict=False))


def bounded(closed: Counter, **bounds: float) -> type[BoundedConnection]:
    """A class of connections that counts in `closed`, with other `bounds` than usual."""
    return type("Connection", (BoundedConnection,), {"closed": closed, **bounds})


def run(app: ASGIApp, closed: Counter, sockets: list[socket.socket] | None = None, **where: Any) -> None:
    """Serve until SIGTERM, at `sockets` or at `where` (host, port); requests under way are finished.

    Args:
        closed: counts the connections that are closed for a bound, by reason.
    """
    # uvicorn stops in order at this signal, then raises it again for the handler from before.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = uvicorn.Config(
        app,
        http=bounded(closed, most=(_allow_files() - _OTHER_FILES) // _FILES_EACH),
        # Nothing here speaks it, and no bound would hold there.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **where,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=sockets)


def _allow_files() -> int:
    """Let as many files be open as connections may need, or as can be. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_EACH * CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted, 2 * _OTHER_FILES)
