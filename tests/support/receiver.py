"""Webhook receiver, as a user's program would be one."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Receiver:
    """Webhook requests received, and the answers to them."""

    url: str = ""
    #: Path, headers by lower-case name, and body of each request, in order.
    got: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    #: Returns the response status for the request of this number, from 0.
    answer: Callable[[int], int] = lambda _: 204
    came: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, requests: int, seconds: float = 240) -> None:
        """Wait until this many requests have arrived."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.got) >= requests, seconds), self.got


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver on a loopback port for the length of the block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            with receiver.came:
                number = len(receiver.got)
                receiver.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                receiver.came.notify_all()
            self.send_response(receiver.answer(number))
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
