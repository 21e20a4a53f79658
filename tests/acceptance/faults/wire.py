"""A line to Postgres that knows the protocol, and strikes a connection at a chosen moment of a write-back.

Sources: PostgreSQL's documentation, "Message Flow" and "Message Formats" of the frontend/backend protocol 3.
"""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum

#: What a write-back says to Postgres in its transaction, by which one is told from other transactions.
_COPY = b'copy "vectormill"."embeddings_'
_METER = b"insert into vectormill.usage"


class Moment(StrEnum):
    """Where in a write-back to strike."""

    #: Half of the first block of vectors has been sent.
    IN_COPY = "in_copy"
    #: COMMIT has been said, and doesn't arrive.
    BEFORE_COMMIT = "before_commit"
    #: It is committed, and the answer doesn't arrive.
    AFTER_COMMIT = "after_commit"


@dataclass
class Call:
    """A client's connection to Postgres by way of the wire."""

    near: socket.socket
    far: socket.socket
    #: The transaction at hand writes a part of a chunk.
    writes: bool = False
    #: Texts of prepared statements by their names.
    prepared: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """The client's port, by which its process is found."""
        return int(self.near.getpeername()[1])

    @property
    def server_port(self) -> int:
        """The port by which Postgres knows it."""
        return int(self.far.getsockname()[1])

    def cut(self) -> None:
        """End it on both sides."""
        for end in (self.near, self.far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class _Trap:
    moment: Moment
    strike: Callable[[Call], None]
    sprung: threading.Event = field(default_factory=threading.Event)


class Wire:
    """A port of loopback through which Postgres is reached."""

    def __init__(self, listener: socket.socket, target: tuple[str, int]) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener, self._target = listener, target
        self._lock = threading.Lock()
        self._trap: _Trap | None = None
        self._calls: list[Call] = []
        self._flowing = threading.Event()
        self._flowing.set()

    def strike(self, moment: Moment, do: Callable[[Call], None], seconds: float) -> bool:
        """Wait for a write-back that comes to `moment`, and call `do` while it stands still there. False: none came."""
        trap = _Trap(moment, do)
        with self._lock:
            self._trap = trap
        if trap.sprung.wait(seconds):
            return True
        with self._lock:
            missed = self._trap is trap
            self._trap = None
        return not missed and trap.sprung.wait(seconds)

    def near_port(self, server_port: int) -> int | None:
        """The client's port of the connection that Postgres knows by this one."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            with suppress(OSError):
                if call.server_port == server_port:
                    return call.port
        return None

    def freeze(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._flowing.clear()

    def thaw(self, *, cut: bool) -> None:
        """All flows again; with `cut`, the connections that were frozen end instead."""
        if cut:
            with self._lock:
                calls = list(self._calls)
            for call in calls:
                call.cut()
        self._flowing.set()

    def serve(self) -> None:
        """Pass on what comes, until the listener is closed."""
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        call = Call(near, far)
        with self._lock:
            self._calls.append(call)
        answers = threading.Thread(target=self._pass, args=(call, self._from_server(call), near), daemon=True)
        answers.start()
        self._pass(call, self._from_client(call), far)
        answers.join()
        with self._lock:
            self._calls.remove(call)
        near.close()
        far.close()

    def _pass(self, call: Call, pieces: Iterator[bytes], sink: socket.socket) -> None:
        with suppress(OSError):
            for piece in pieces:
                self._flowing.wait()
                sink.sendall(piece)
        call.cut()

    def _from_client(self, call: Call) -> Iterator[bytes]:
        reader = _Reader(call.near)
        # Before the start-up message, which has no type, encryption may be asked for; Postgres says no in one byte.
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

    def _from_server(self, call: Call) -> Iterator[bytes]:
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
            return self._trap is not None and self._trap.moment is moment

    def _spring(self, moment: Moment, call: Call) -> None:
        with self._lock:
            trap = self._trap
            if trap is None or trap.moment is not moment:
                return
            self._trap = None
        trap.strike(call)
        trap.sprung.set()


def _statement(call: Call, kind: bytes, body: bytes) -> bytes:
    """The SQL that a message stands for: one that is asked, prepared, or was and is asked again."""
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
    """Whole messages from a socket. What has ended reads as empty."""

    def __init__(self, source: socket.socket) -> None:
        self._file = source.makefile("rb", buffering=262_144)

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        return data if len(data) == count else b""

    def message(self) -> bytes:
        head = self.take(5)
        return head + self.take(struct.unpack(">I", head[1:])[0] - 4) if head else b""


@contextmanager
def wire_to(host: str, port: int) -> Iterator[Wire]:
    """A wire to a Postgres, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        wire = Wire(listener, (host, port))
        threading.Thread(target=wire.serve, daemon=True).start()
        try:
            yield wire
        finally:
            wire.thaw(cut=True)
            listener.shutdown(socket.SHUT_RDWR)
