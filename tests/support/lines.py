"""A line to a server that a test can freeze or cut, as networks and machines do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit


@dataclass(eq=False)
class Call:
    """A client's connection to the server by way of a line."""

    near: socket.socket
    far: socket.socket

    @property
    def port(self) -> int:
        """The client's port, by which its process is found."""
        return int(self.near.getpeername()[1])

    @property
    def server_port(self) -> int:
        """The port by which the server knows it."""
        return int(self.far.getsockname()[1])

    def cut(self) -> None:
        """End it on both sides."""
        for end in (self.near, self.far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Line:
    """A port of loopback through which a server is reached."""

    port: int
    target: tuple[str, int]
    _flowing: threading.Event = field(default_factory=threading.Event)
    _cut: bool = False
    #: Guards the calls.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _calls: list[Call] = field(default_factory=list)

    def freeze(self) -> None:
        """Nothing comes through any more; nobody is told."""
        self._flowing.clear()

    def cut(self) -> None:
        """Connections end, and new ones too."""
        self._cut = True
        for call in self.calls():
            call.cut()
        self._flowing.set()

    def mend(self) -> None:
        """All is as before."""
        self._cut = False
        self._flowing.set()

    def calls(self) -> list[Call]:
        """The connections that there are."""
        with self._lock:
            return list(self._calls)

    def serve(self, listener: socket.socket) -> None:
        """Pass on what comes, until the listener is closed."""
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near:
            try:
                far = socket.create_connection(self.target)
            except OSError:  # the server is away
                return
            with far:
                call = self._call(near, far)
                with self._lock:
                    self._calls.append(call)
                if self._cut:
                    call.cut()
                answers = threading.Thread(target=self._pass, args=(call, self._from_server(call), near), daemon=True)
                answers.start()
                self._pass(call, self._from_client(call), far)
                answers.join()
                with self._lock:
                    self._calls.remove(call)

    def _pass(self, call: Call, pieces: Iterator[bytes], sink: socket.socket) -> None:
        with suppress(OSError):
            for piece in pieces:
                self._flowing.wait()
                sink.sendall(piece)
        call.cut()

    # What lines that know a protocol do otherwise.

    def _call(self, near: socket.socket, far: socket.socket) -> Any:
        return Call(near, far)

    def _from_client(self, call: Any) -> Iterator[bytes]:
        return _pieces(call.near)

    def _from_server(self, call: Any) -> Iterator[bytes]:
        return _pieces(call.far)


def _pieces(source: socket.socket) -> Iterator[bytes]:
    while data := source.recv(65_536):
        yield data


L = TypeVar("L", bound=Line)


@contextmanager
def line_to(host: str, port: int, kind: type[L]) -> Iterator[L]:
    """A line of this kind to a server, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        line = kind(listener.getsockname()[1], (host, port))
        line.mend()
        threading.Thread(target=line.serve, args=(listener,), daemon=True).start()
        try:
            yield line
        finally:
            line.cut()
            listener.shutdown(socket.SHUT_RDWR)


def at_port(url: str, port: int) -> str:
    """The same server by way of another port."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()
