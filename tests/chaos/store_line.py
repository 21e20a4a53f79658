"""Line to an object store that knows enough HTTP to answer in its place, and to strike in the middle of an upload."""

import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.trap import Trap
from tests.support.lines import Call, Line

_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\ncontent-type: application/xml\r\ncontent-length: 79\r\nconnection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class StoreLine(Line):
    """Loopback port through which the store is reached."""

    _refusing: bool = False
    _trap: Trap | None = None

    def refuse(self) -> None:
        """Close all connections, and answer every request with 503."""
        self._refusing = True
        for call in self.calls():
            call.cut()

    def mend(self) -> None:
        """End all faults of the line."""
        self._refusing = False
        super().mend()

    def strike(self, do: Callable[[Call], None], seconds: float) -> bool:
        """Wait for an upload, and call `do` when half of it, or less, is through. Return False if none came."""
        self._trap = trap = Trap(do)
        try:
            return trap.sprung(seconds)
        finally:
            self._trap = None

    def _connect(self, near: socket.socket) -> None:
        if not self._refusing:
            super()._connect(near)
            return
        with near, near.makefile("rb") as request:
            head = b"".join(iter(request.readline, b"\r\n"))
            if length := _LENGTH.search(head):
                request.read(int(length[1]))
            near.sendall(_SLOW_DOWN)

    def _from_client(self, call: Call) -> Iterator[bytes]:
        for piece in super()._from_client(call):
            trap = self._trap
            if trap and piece.startswith(b"PUT ") and b".parquet" in piece.partition(b"\r\n")[0]:
                self._trap = None
                yield piece[: len(piece) // 2]
                trap.spring(call)
                piece = piece[len(piece) // 2 :]
            yield piece
