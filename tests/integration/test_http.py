"""HTTP transport with one deadline per request, against sockets that behave as servers and networks do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from pipeline.infra.http import status_of

ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


@contextmanager
def server(family: socket.AddressFamily, host: str, port: int = 0) -> Iterator[tuple[int, list[bytes]]]:
    """Answer each connection with 204; yield the port, and the requests as they came."""
    requests: list[bytes] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    requests.append(connection.recv(65_536))
                    connection.sendall(ANSWER)

    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def silent(host: str) -> Iterator[int]:
    """Listen, and let no connection come about: the queue of those that wait is full."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            waiting.append(one)
        try:
            yield listener.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


def test_an_address_in_brackets_is_told_in_brackets() -> None:
    try:
        with closing(socket.socket(socket.AF_INET6)) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server(socket.AF_INET6, "::1") as (port, requests):
        assert status_of(f"http://user:word@[::1]:{port}/healthz", seconds=60) == 204
    assert requests[0].startswith(b"GET /healthz HTTP/1.1\r\n")
    assert f"host: [::1]:{port}\r\n".encode() in requests[0].lower()
    assert b"word" not in requests[0]


def test_an_address_that_hangs_leaves_time_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def both(host: str, port: int, *more: Any, **how: Any) -> list[Any]:
        found = [look_up(address, port, *more, **how)[0] for address in ("127.0.0.2", "127.0.0.3")]
        return found if host == "two.example" else look_up(host, port, *more, **how)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with silent("127.0.0.2") as port, server(socket.AF_INET, "127.0.0.3", port) as (_, requests):
        assert status_of(f"http://two.example:{port}/", seconds=4) == 204
    assert f"host: two.example:{port}".encode() in requests[0].lower()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://nobody.invalid/", "ftp://x/", "nonsense", "http://é/"])
def test_no_answer_is_none(url: str) -> None:
    assert status_of(url, seconds=60) is None
