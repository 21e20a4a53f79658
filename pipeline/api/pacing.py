"""Rate limits by caller that leave the processor to others, beside the limits that a workspace is given.

Each workspace has a line of its own, in which a request waits before anything is done for it. Vectors are bounded by
limits and the engines' queues; only their refusals count, in a second line. An unknown caller waits for the answer, in
the line of its network.
"""

import time
from collections.abc import Hashable
from http import HTTPStatus

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import RateLimited
from pipeline.http_server import TURN, Turn, network_of

_PER_SECOND = 200
#: So many at once wait for nothing.
_BURST = 50
#: A request that would have to wait longer is refused.
_MOST_SECONDS = 5.0
#: Beyond so many, lines in which nobody waits are forgotten.
_LINES = 10_000
#: Orchestrators restart what doesn't answer them at once.
_PROBES = frozenset({"/healthz", "/readyz"})


class Lines:
    """Lines of requests, each served at the same steady rate."""

    def __init__(self) -> None:
        #: When the next turn of each line is.
        self._next: dict[Hashable, float] = {}

    def seconds(self, line: Hashable) -> float:
        """Return how long the next one of a line waits."""
        return max(0.0, self._next.get(line, 0.0) - time.monotonic())

    def owe(self, line: Hashable, turns: int = 1) -> None:
        """Take turns without waiting for them, unless the line is as long as may be."""
        now = time.monotonic()
        last = max(self._next.get(line, 0.0), now - _BURST / _PER_SECOND)
        self._next[line] = min(last, now + _MOST_SECONDS) + turns / _PER_SECOND
        if len(self._next) > _LINES:
            self._next = {line: at for line, at in self._next.items() if at > now}

    def give_back(self, line: Hashable, turns: int) -> None:
        """Return turns."""
        if line in self._next:
            self._next[line] -= turns / _PER_SECOND

    async def wait(self, line: Hashable, turn: Turn, turns: int = 1) -> float:
        """Wait for a turn, and take so many. Returns how long, in seconds.

        Raises:
            RateLimited: the line is too long, which is told as late as if it weren't.
            ClientDisconnect: the client went away.
        """
        seconds = self.seconds(line)
        is_too_long = seconds > _MOST_SECONDS
        if not is_too_long:
            self.owe(line, turns)
        if seconds and not await turn.come(min(seconds, _MOST_SECONDS)):
            raise ClientDisconnect
        if is_too_long:
            raise RateLimited(
                f"More than {_PER_SECOND} requests a second; wait for answers before you ask again.",
                retry_after_seconds=seconds,
            )
        return seconds


async def take_turn(request: Request, workspace_id: int, *, vectors: bool, turns: int) -> None:
    """Wait for the turn of a workspace that has asked too often. A client that goes away meanwhile gives it back.

    Args:
        vectors: some are asked for.
        turns: what the request costs.

    Raises:
        RateLimited, ClientDisconnect: as `Lines.wait` does.
    """
    lines: Lines = request.app.state.lines
    line = workspace_id, vectors
    seconds = lines.seconds(line)
    if vectors and not seconds:
        request.state.owes_refusals_to = line
        return
    try:
        request.state.waited = await lines.wait(line, request.scope["state"].get(TURN) or Turn(), turns)
    except ClientDisconnect:
        if seconds <= _MOST_SECONDS:
            lines.give_back(line, turns)
        raise


class Paced:
    """Middleware that delays answers to unknown callers, and counts refusals of vectors."""

    def __init__(self, app: ASGIApp, lines: Lines) -> None:
        self._app, self._lines = app, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if "caller" not in state:
                    await self._hold(scope, message)
                elif message["status"] >= HTTPStatus.BAD_REQUEST and (line := state.get("owes_refusals_to")):
                    self._lines.owe(line)
            await send(message)

        await self._app(scope, receive, sending)

    async def _hold(self, scope: Scope, message: Message) -> None:
        line = network_of(scope["client"][0]) if scope.get("client") else ""
        try:
            scope["state"]["waited"] = await self._lines.wait(line, scope["state"].get(TURN) or Turn())
        except RateLimited:
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        except ClientDisconnect:
            return  # what is sent goes nowhere
