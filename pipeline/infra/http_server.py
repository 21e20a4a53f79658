"""HTTP server of api and engine: uvicorn, with limits against slow clients (slowloris) and too many connections.

uvicorn only limits how long a connection idles after a request. It would wait without end for a request head that never
ends, or for a client that never reads its response.
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

#: Idle timeout of a connection between requests.
KEEP_ALIVE_SECONDS = 75
#: Timeout of a request head, from the connection's opening or the request's first byte to the head's end.
HEAD_SECONDS = 30.0
#: The most bytes of a head, or of data after a body.
HEAD_BYTES = 65_536
#: A client must read this many bytes of a waiting response in this time, or its connection is dropped.
TAKEN_BYTES = 65_536
TAKEN_SECONDS = 120.0
#: The most connections at a time, if the limit of open files allows for them.
CONNECTIONS = 2_000
#: File descriptors reserved for everything but connections.
_OTHER_FILES = 256
#: Key of the connection's `Turn` in a request's state.
TURN = "turn"
#: File descriptors per connection: a request that is passed on to an engine or an upstream takes a second one.
_FILES_EACH = 2

_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"


class Turn:
    """A wait of a connection's request that ends early when the client disconnects or the server shuts down."""

    def __init__(self) -> None:
        self.is_awaited = False
        self._is_gone = False
        self._over = asyncio.Event()

    async def come(self, seconds: float) -> bool:
        """Wait for `seconds`, or less if the wait is ended. Return True if the client is still connected."""
        self.is_awaited = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        self.is_awaited = False
        return not self._is_gone

    def end(self, *, gone: bool) -> None:
        """End this wait and all later ones of the connection. `gone`: the client has disconnected."""
        self._is_gone |= gone
        self._over.set()


class BoundedConnection(HttpToolsProtocol):
    """A connection with timeouts and size limits. `bounded` makes subclasses with a counter and limits of their own."""

    most = CONNECTIONS
    head_seconds = HEAD_SECONDS
    taken_seconds = TAKEN_SECONDS
    closed: Counter

    _head_timer: asyncio.TimerHandle | None = None
    _taking_timer: asyncio.TimerHandle | None = None
    #: Bytes received since the last piece of a head or a body.
    _unparsed = 0
    #: Bytes of responses that the client hadn't read at the last check.
    _unread = 0
    _in_head = False

    @property
    def waits(self) -> bool:
        """True if no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timers, and make room if there are too many connections."""
        super().connection_made(transport)
        self.opened, self.turn = time.monotonic(), Turn()
        self._expect_head()
        self._taking_timer = self.loop.call_later(self.taken_seconds, self._check_taking)
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and end the wait of a request."""
        self.turn.end(gone=True)
        self._forget_head()
        if self._taking_timer:
            self._taking_timer.cancel()
        # uvicorn cancels its own timer only when a connection ends in order.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received data, and limit the size of all that isn't a body."""
        self._unparsed += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unparsed > HEAD_BYTES:
            self._end("head_too_large", _TOO_LARGE)
        elif self.waits:
            self._expect_head()

    def on_message_begin(self) -> None:
        """Note that a head begins, possibly while the request before it is in progress (pipelining)."""
        self._in_head = True
        super().on_message_begin()
        self.scope["state"][TURN] = self.turn

    def on_headers_complete(self) -> None:
        """Start a request: stop the head's timer and reset the counts."""
        self._unparsed, self._unread, self._in_head = 0, 0, False
        self._forget_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass on a piece of the body, which doesn't count as a head."""
        self._unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """End a request. The timeout of a head that has begun in the meantime starts now."""
        super().on_response_complete()
        if self._in_head:
            self._expect_head()

    def shutdown(self) -> None:
        """Shut down once requests in progress are answered; a waiting request's wait ends now."""
        self.turn.end(gone=False)
        super().shutdown()

    def resume_writing(self) -> None:
        """Continue writing, as the client has read what was buffered."""
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
        """Drop the connection if its client reads the waiting response too slowly."""
        # While more is being written, the buffer's size doesn't tell how much was read.
        still = self.waits or self.flow.write_paused or self.transport.is_closing()
        unread = self.transport.get_write_buffer_size() if still else 0
        if unread and self._unread and unread > self._unread - TAKEN_BYTES:
            self.drop("slow_reader")
            return
        self._unread = unread
        self._taking_timer = self.loop.call_later(self.taken_seconds, self._check_taking)

    def _make_room(self) -> None:
        """Drop a connection of the client that has the most connections, or refuse this one.

        Connections between requests, or whose request waits for its turn, go first: those without any request yet
        before the others, then the oldest. If there is none, the newest one whose body is still being sent goes. If
        there is none either, this connection gets a 503.
        """
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
        """Send a last response and close, unless the connection is closing already."""
        if not self.transport.is_closing():
            self.closed.labels(reason).inc()
            self.transport.write(answer)
            self.transport.close()

    def drop(self, reason: str) -> None:
        """Close at once, and discard data that waits to be sent."""
        self.closed.labels(reason).inc()
        self.connections.discard(self)
        self.transport.abort()


def _network(connection: BoundedConnection) -> str:
    return network_of(connection.client[0]) if connection.client else ""


@lru_cache(4_096)
def network_of(host: str) -> str:
    """Return a client's IPv4 address, or its IPv6 /64 network, in which one machine may have any number of addresses.

    Anything else is returned as it is.
    """
    try:
        address = ip_address(host)
    except ValueError:  # a socket's path, or a name that a load balancer reports
        return host
    if isinstance(address, IPv4Address) or address.ipv4_mapped:
        return host
    return str(IPv6Network((int(address), 64), strict=False))


def bounded(closed: Counter, **bounds: float) -> type[BoundedConnection]:
    """Return a class of connections that counts in `closed`, with `bounds` in place of the default limits."""
    return type("Connection", (BoundedConnection,), {"closed": closed, **bounds})


def run(app: ASGIApp, closed: Counter, sockets: list[socket.socket] | None = None, **where: Any) -> None:
    """Serve until SIGTERM, at `sockets` or at `where` (host, port); requests in progress are finished.

    Args:
        closed: counts the connections that are closed because of a limit, by reason.
    """
    # uvicorn shuts down at this signal, then raises it again for the handler that was set before.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = uvicorn.Config(
        app,
        http=bounded(closed, most=(_allow_files() - _OTHER_FILES) // _FILES_EACH),
        # Nothing here uses WebSockets, and no limit would apply to them.
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
    """Raise the limit of open files to what the connections may need, or as far as allowed. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_EACH * CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted, 2 * _OTHER_FILES)
