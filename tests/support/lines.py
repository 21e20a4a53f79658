"""TCP proxy to a server, called a line, which a test can freeze or cut as networks and machines do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit


@dataclass(eq=False)
class Call:
    """Connection of a client to the server through a line."""

    near: socket.socket
    far: socket.socket

    @property
    def port(self) -> int:
        """The client's port, by which its process can be found."""
        return int(self.near.getpeername()[1])

    @property
    def server_port(self) -> int:
        """The client's port as the server sees it."""
        return int(self.far.getsockname()[1])

    def cut(self) -> None:
        """Shut the connection down on both sides."""
        for end in (self.near, self.far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Line:
    """Proxy on a loopback port through which a server is reached."""

    port: int
    target: tuple[str, int]
    _flowing: threading.Event = field(default_factory=threading.Event)
    _cut: bool = False
    #: Guards `_calls`.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _calls: list[Call] = field(default_factory=list)

    def freeze(self) -> None:
        """Let nothing through, without an error at either end."""
        self._flowing.clear()

    def cut(self) -> None:
        """Shut down all connections, and new ones as they come."""
        self._cut = True
        for call in self.calls():
            call.cut()
        self._flowing.set()

    def mend(self) -> None:
        """Undo `freeze` and `cut`."""
        self._cut = False
        self._flowing.set()

    def calls(self) -> list[Call]:
        """Return the open connections."""
        with self._lock:
            return list(self._calls)

    def serve(self, listener: socket.socket) -> None:
        """Accept and forward connections until the listener is closed."""
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

    # Hooks for lines that know a protocol.

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
    """Open a line of this kind to a server for the length of the block."""
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
    """Return the URL of the same server through another port on loopback."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()
