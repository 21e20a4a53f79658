"""Server in a child process, which is replaced when it is killed."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.acceptance.fleet import eventually

#: Server that tells each client its pid and how many were killed before it, and ends by itself when a client asks.
_SERVER = """
import os, socket, sys
from workers.engine.succession import hold_signals, serve_in_child

def serve(listener, deaths):
    while True:
        client, _ = listener.accept()
        client.sendall(f"{os.getpid()} {deaths}".encode())
        if client.recv(1) == b"!":
            sys.exit(7)
        client.close()

hold_signals()
serve_in_child(serve, socket.socket(fileno=int(sys.argv[1])))
"""


@contextmanager
def _serving() -> Iterator[tuple[subprocess.Popen[bytes], tuple[str, int]]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        address = listener.getsockname()
    try:
        yield process, address
    finally:
        process.kill()
        process.wait()


def _ask(address: tuple[str, int], what: bytes = b".") -> tuple[int, int]:
    """Return the serving child's pid, and how many were killed before it. No client is ever refused."""
    with socket.create_connection(address, timeout=60) as line:
        pid, deaths = map(int, line.recv(100).split())
        line.sendall(what)
        line.recv(1)
    return pid, deaths


def _end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """End a process by a signal, and wait: a process that is ending may still take a connection."""
    process = psutil.Process(pid)
    process.send_signal(number)
    eventually(lambda: _has_ended(process), "its end")


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_who_is_killed_is_replaced_and_who_comes_meanwhile_waits() -> None:
    with _serving() as (parent, address):
        seen = {parent.pid}
        for before, number in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL)):
            pid, deaths = _ask(address)
            assert deaths == before
            assert pid not in seen
            seen.add(pid)
            _end(pid, number)
        assert _ask(address)[0] not in seen


def test_one_that_dies_again_and_again_is_given_up() -> None:
    with _serving() as (parent, address):
        for _ in range(4):
            _end(_ask(address)[0])
        assert parent.wait(60) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_to_end_ends_with_its_child(number: signal.Signals) -> None:
    with _serving() as (parent, address):
        child = psutil.Process(_ask(address)[0])
        parent.send_signal(number)
        assert parent.wait(60) == 0
        assert not child.is_running()
        with pytest.raises(ConnectionRefusedError):
            _ask(address)


def test_a_child_that_ends_by_itself_is_not_replaced() -> None:
    with _serving() as (parent, address):
        _ask(address, b"!")
        assert parent.wait(60) == 7


def test_a_child_dies_with_its_parent() -> None:
    with _serving() as (parent, address):
        child = psutil.Process(_ask(address)[0])
        parent.kill()
        eventually(lambda: _has_ended(child), "the child's end")
