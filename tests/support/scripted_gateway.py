"""Scripted upstream, good or bad: a real HTTP server whose answers a test decides."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DIMENSIONS = 8

#: Request body → status, headers and body (an object to write as JSON, or bytes); or None to cut the connection; or the
#: raw bytes of the response, piece by piece.
Answer = tuple[int, Mapping[str, str], Any]
Answering = Callable[[dict[str, Any]], Answer | Iterator[bytes] | None]


def vector_of(text: str) -> list[float]:
    """Return the text's own vector, of length one."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).normal(size=DIMENSIONS).astype(np.float32)
    return [float(one) for one in vector / np.linalg.norm(vector)]


def good(asked: dict[str, Any], **headers: str) -> Answer:
    """Return the answer of a healthy gateway, which counts a word as a token."""
    packed = asked.get("encoding_format") == "base64"
    vectors = [vector_of(text) for text in asked["input"]]
    rows = [base64.b64encode(np.array(one, "<f4").tobytes()).decode() if packed else one for one in vectors]
    tokens = sum(len(text.split()) for text in asked["input"])
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(rows)],
        "model": asked["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return 200, {name.replace("_", "-"): value for name, value in headers.items()}, body


def error(status: int, code: str = "", **headers: str) -> Answer:
    """Return an error in OpenAI's envelope."""
    fields = {"message": "it quotes the text", "type": "some_error", "param": None, "code": code or None}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {"error": fields}


def trickling(begin: bytes) -> Iterator[bytes]:
    """Yield an answer that never ends, a byte at a time."""
    yield begin
    while True:
        time.sleep(0.02)
        yield b"x"


def hanging() -> Iterator[bytes]:
    """Yield nothing for 20 seconds, by when the client has long given up."""
    time.sleep(20)
    yield b""


@dataclass
class ScriptedGateway:
    """Running server. `answer` may be replaced at any time; `requests` holds the bodies received.

    A health check gets no response before `healthy` is set, or for 60 seconds.
    """

    url: str
    answer: Answering = good
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    healthy: threading.Event = field(default_factory=threading.Event)


@contextmanager
def scripted_gateway() -> Iterator[ScriptedGateway]:
    """Run a scripted upstream on a port of its own for the length of the block."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            made.healthy.wait(60)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                made.requests.append(asked)
                made.keys.append(self.headers["authorization"])
                made.connections.add(self.client_address)
                answer = made.answer(asked)
            if answer is None:
                self.close_connection = True
                return
            if isinstance(answer, Iterator):
                self.close_connection = True
                for piece in answer:
                    self.wfile.write(piece)
                return
            status, headers, body = answer
            packed = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(packed)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(packed)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Ignore errors, since clients may disconnect in the middle."""

    server = Server(("127.0.0.1", 0), Handler)
    made = ScriptedGateway(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.healthy.set()
        server.shutdown()
        server.server_close()
        thread.join()
