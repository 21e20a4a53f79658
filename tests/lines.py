"""A line to a server that a test can freeze or cut, as networks and machines do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Line:
    """A port of loopback through which a server is reached."""

    port: int
    target: tuple[str, int]
    flowing: threading.Event = field(default_factory=threading.Event)
    _cut: bool = False
    _sockets: list[socket.socket] = field(default_factory=list)

    def freeze(self) -> None:
        """Nothing comes through any more; nobody is told."""
        self.flowing.clear()

    def cut(self) -> None:
        """Connections end, and new ones too."""
        self._cut = True
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.flowing.set()

    def mend(self) -> None:
        """All is as before."""
        self._cut = False
        self.flowing.set()

    def serve(self, listener: socket.socket) -> None:
        """Pass on what comes, until the listener is closed."""
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                if self._cut:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(self.target)
                except OSError:  # the server is away
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(65_536):
                self.flowing.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(host: str, port: int) -> Iterator[Line]:
    """A line to a server, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = Line(listener.getsockname()[1], (host, port))
        line.mend()
        threading.Thread(target=line.serve, args=(listener,), daemon=True).start()
        try:
            yield line
        finally:
            line.cut()
            listener.shutdown(socket.SHUT_RDWR)
