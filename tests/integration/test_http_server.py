"""HTTP server whose clients are slow on purpose, or too many: others are served meanwhile."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Counter
from starlette.types import Receive, Scope, Send

from pipeline.infra.http_server import HEAD_BYTES, TURN, bounded
from tests.acceptance.fleet import eventually

#: Answer larger than the kernel's buffers.
_ANSWER = b"x" * 64 * 1024 * 1024
_HALF = b"GET / HTTP/1.1\r\nhost: here\r\nx-slow: "


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, then send a short answer; at /long a very long one, at /paced one in ten minutes."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/paced":
        await scope["state"][TURN].come(600)
    body = _ANSWER if scope["path"] == "/long" else b"ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server:
    """Server that runs in a thread."""

    def __init__(self, closed: Counter, **bounds: float) -> None:
        self._closed = closed
        self.listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            answer, http=bounded(closed, **bounds), ws="none", lifespan="off", log_config=None, timeout_keep_alive=75
        )
        self.server = uvicorn.Server(config)
        self.address = self.listener.getsockname()

    def closed(self, reason: str) -> int:
        """Return the number of connections that the server has closed for a reason."""
        return int(self._closed.labels(reason)._value.get())

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        """Connect from an address of this machine."""
        return socket.create_connection(self.address, timeout=60, source_address=(host, 0))

    def get(self) -> int:
        """Send another client's request, on a connection of its own, and return its status."""
        return httpx.get(f"http://127.0.0.1:{self.address[1]}/", timeout=60).status_code


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as running:
        yield lambda **bounds: running.enter_context(_running(**bounds))


@contextmanager
def _running(**bounds: float) -> Iterator[Server]:
    made = Server(Counter("closed", "of this test", ["reason"], registry=CollectorRegistry()), **bounds)
    thread = threading.Thread(target=made.server.run, kwargs={"sockets": [made.listener]})
    thread.start()
    try:
        eventually(lambda: made.server.started, "a server")
        yield made
    finally:
        made.server.should_exit = made.server.force_exit = True
        thread.join()


@pytest.mark.parametrize("begin", [b"", b"G", _HALF, b"GET / HTTP/1.1\r\nhost: here\r\n\r\nGET / HT"])
def test_a_head_that_is_never_ended(serve: Callable[..., Server], begin: bytes) -> None:
    """The head may stall anywhere, on a new connection or on one that has served a request."""
    server = serve(head_seconds=3)
    with server.connect() as slow:
        slow.sendall(begin)
        eventually(lambda: server.closed("slow_head"), "the end of its patience")
        said = b""
        while piece := slow.recv(1000):
            said += piece
        assert said.endswith(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
    assert server.get() == 200


def test_a_byte_now_and_then_is_no_head(serve: Callable[..., Server]) -> None:
    server = serve(head_seconds=3)
    with server.connect() as slow:
        slow.sendall(_HALF)

        def drip() -> bool:
            _send(slow, b"a")
            return bool(server.closed("slow_head"))

        eventually(drip, "the end of its patience")


def test_a_body_may_take_longer_than_a_head(serve: Callable[..., Server]) -> None:
    server = serve(head_seconds=3)
    with server.connect() as slow, server.connect() as head:
        slow.sendall(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 3\r\n\r\na")
        head.sendall(_HALF)
        eventually(lambda: server.closed("slow_head") == 1, "the other's end")
        slow.sendall(b"bc")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "begin",
    [
        _HALF,
        b"GET /" + b"a" * 10,
        # Trailers after a chunked body.
        b"POST / HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-after: ",
        b"POST / HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n1;extension=",
    ],
)
def test_a_head_without_end(serve: Callable[..., Server], begin: bytes) -> None:
    server = serve()
    with server.connect() as endless:
        _send(endless, begin)
        for _ in range(100):
            _send(endless, b"a" * HEAD_BYTES)
    assert server.closed("head_too_large") == 1
    assert server.get() == 200


def test_an_answer_that_nobody_reads(serve: Callable[..., Server]) -> None:
    server = serve(taken_seconds=3)
    with server.connect() as slow:
        slow.sendall(b"GET /long HTTP/1.1\r\nhost: here\r\n\r\n")
        eventually(lambda: server.closed("slow_reader"), "the end of its patience")
    assert server.get() == 200


def test_an_answer_that_is_read_slowly_but_surely(serve: Callable[..., Server]) -> None:
    server = serve(taken_seconds=3)
    with server.connect() as reading, server.connect() as other:
        for connection in (reading, other):
            connection.sendall(b"GET /long HTTP/1.1\r\nhost: here\r\n\r\n")
        size = 0
        # Keep reading after the other client, which reads nothing, has been cut off.
        while piece := reading.recv(65_536 if server.closed("slow_reader") else 262_144):
            size += len(piece)
            if size > len(_ANSWER):
                break
        assert size > len(_ANSWER)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_crowd_takes_no_one_elses_place(serve: Callable[..., Server], host: str) -> None:
    """The crowd has an address of its own, or shares everybody's, as behind a proxy. Active clients aren't disturbed,
    and new ones are let in."""
    server = serve(most=20)
    with ExitStack() as opened:
        at_work = opened.enter_context(server.connect())
        at_work.sendall(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n\r\na")
        kept = opened.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{server.address[1]}", timeout=60))
        assert kept.get("/").status_code == 200
        crowd = [opened.enter_context(server.connect(host)) for _ in range(40)]
        for one in crowd:
            _send(one, _HALF)
        eventually(lambda: server.closed("full") >= 22, "room made")
        for _ in range(5):
            assert server.get() == 200
            assert kept.get("/").status_code == 200
        at_work.sendall(b"b")
        assert at_work.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_crowd_of_bodies_that_dont_come(serve: Callable[..., Server]) -> None:
    server = serve(most=20)
    with ExitStack() as opened:
        for _ in range(40):
            one = opened.enter_context(server.connect("127.0.0.2"))
            _send(one, b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n\r\na")
        assert server.get() == 200
    assert server.closed("full") >= 20


@pytest.mark.parametrize("requests", [1, 3])
def test_a_crowd_that_waits_for_its_turn(serve: Callable[..., Server], requests: int) -> None:
    """Each client has one request, or several at once."""
    server = serve(most=20)
    with ExitStack() as opened:
        for _ in range(40):
            _send(opened.enter_context(server.connect()), b"GET /paced HTTP/1.1\r\nhost: here\r\n\r\n" * requests)
        assert server.get() == 200
    assert server.closed("full") >= 20
    eventually(lambda: not server.server.server_state.tasks, "nothing that waits for who has gone")


def test_a_server_that_ends_lets_nobody_wait(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect() as waiting:
        _send(waiting, b"GET /paced HTTP/1.1\r\nhost: here\r\n\r\n")
        eventually(lambda: server.server.server_state.tasks, "a request under way")
        server.server.should_exit = True
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")


def _send(connection: socket.socket, data: bytes) -> None:
    """Send to a server that may have closed the connection."""
    try:
        connection.sendall(data)
    except OSError:
        return


def test_a_bound_that_isnt_met_costs_nothing(serve: Callable[..., Server]) -> None:
    server = serve()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.address[1]}", timeout=60) as client:
        sizes: list[Any] = [len(client.get(path).content) for path in ("/", "/long", "/", "/long")]
    assert sizes == [2, len(_ANSWER), 2, len(_ANSWER)]
    assert [server.closed(reason) for reason in ("slow_head", "head_too_large", "slow_reader", "full")] == [0] * 4
