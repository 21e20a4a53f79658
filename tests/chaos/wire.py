"""Line to Postgres that knows the protocol, and strikes a connection at a chosen moment of a write-back.

Sources: PostgreSQL's documentation, "Message Flow" and "Message Formats" of the frontend/backend protocol 3.
"""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from tests.chaos.trap import Trap
from tests.support.lines import Call, Line

#: Statements of a write-back, which tell its transaction from others.
_COPY = b'copy "vectormill"."embeddings_'
_METER = b"insert into vectormill.usage"


class Moment(StrEnum):
    """Moment of a write-back at which to strike."""

    #: Half of the first block of vectors has been sent.
    IN_COPY = "in_copy"
    #: COMMIT has been sent, and doesn't arrive.
    BEFORE_COMMIT = "before_commit"
    #: The transaction is committed, and the answer doesn't arrive.
    AFTER_COMMIT = "after_commit"


@dataclass(eq=False)
class CommitCall(Call):
    """Client's connection to Postgres."""

    #: True if the current transaction writes a part of a chunk.
    writes: bool = False
    #: Texts of prepared statements, by name.
    prepared: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class Wire(Line):
    """Loopback port through which Postgres is reached."""

    _trap: Trap | None = None
    _moment: Moment | None = None

    def strike(self, moment: Moment, do: Callable[[Call], None], seconds: float) -> bool:
        """Wait for a write-back to reach `moment`, and call `do` while it stands still. Return False if none came."""
        trap = Trap(do)
        with self._lock:
            self._trap, self._moment = trap, moment
        if trap.sprung(seconds):
            return True
        with self._lock:
            missed = self._trap is trap
            self._trap = None
        return not missed and trap.sprung(seconds)

    def near_port(self, server_port: int) -> int | None:
        """Return the client's port of the connection that Postgres sees from `server_port`."""
        for call in self.calls():
            with suppress(OSError):
                if call.server_port == server_port:
                    return call.port
        return None

    def _call(self, near: socket.socket, far: socket.socket) -> CommitCall:
        # A message goes out in parts, none of which may wait for the acknowledgement of the one before.
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return CommitCall(near, far)

    def _from_client(self, call: CommitCall) -> Iterator[bytes]:
        reader = _Reader(call.near)
        # A client may ask for encryption before the start-up message, which has no type; Postgres declines in one byte.
        while head := reader.take(4):
            body = reader.take(struct.unpack(">I", head)[0] - 4)
            yield head + body
            if body[:2] == b"\x00\x03":
                break
        while message := reader.message():
            kind, body = message[:1], message[5:]
            statement = _statement(call, kind, body)
            call.writes = call.writes or statement.startswith(_COPY) or _METER in statement
            if kind == b"d" and call.writes and self._wanted(Moment.IN_COPY):
                half = len(message) // 2
                yield message[:half]
                self._spring(Moment.IN_COPY, call)
                message = message[half:]
            if statement.startswith(b"COMMIT") and call.writes:
                self._spring(Moment.BEFORE_COMMIT, call)
            yield message

    def _from_server(self, call: CommitCall) -> Iterator[bytes]:
        reader = _Reader(call.far)
        first = reader.take(1)
        while first == b"N":
            yield first
            first = reader.take(1)
        while first:
            head = reader.take(4)
            body = reader.take(struct.unpack(">I", head)[0] - 4)
            if first == b"C" and body.startswith((b"COMMIT", b"ROLLBACK")):
                if call.writes and body.startswith(b"COMMIT"):
                    self._spring(Moment.AFTER_COMMIT, call)
                call.writes = False
            yield first + head + body
            first = reader.take(1)

    def _wanted(self, moment: Moment) -> bool:
        with self._lock:
            return self._trap is not None and self._moment is moment

    def _spring(self, moment: Moment, call: CommitCall) -> None:
        with self._lock:
            trap = self._trap
            if trap is None or self._moment is not moment:
                return
            self._trap = None
        trap.spring(call)


def _statement(call: CommitCall, kind: bytes, body: bytes) -> bytes:
    """Return the SQL that a message stands for: of a simple query, of a Parse, or of a Bind to a prepared statement."""
    if kind == b"Q":
        return body
    if kind == b"P":
        name, text, _ = body.split(b"\0", 2)
        call.prepared[name] = text
        return text
    if kind == b"B":
        _, name, _ = body.split(b"\0", 2)
        return call.prepared.get(name, b"")
    return b""


class _Reader:
    """Reader of whole messages from a socket. After the end it reads as empty."""

    def __init__(self, source: socket.socket) -> None:
        self._file = source.makefile("rb", buffering=262_144)

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        return data if len(data) == count else b""

    def message(self) -> bytes:
        head = self.take(5)
        return head + self.take(struct.unpack(">I", head[1:])[0] - 4) if head else b""
