"""Rate limits by caller that leave the processor to others, beside the limits that a workspace is given.

Each workspace has a line of its own, in which a request waits before anything is done for it. Vectors are bounded by
limits and the engines' queues; only their refusals take turns, in a second line. An unknown caller waits for the
answer, in the line of its network. Nobody is refused: a refusal would cost as much as the answer, and be asked again.
"""

import time
from collections.abc import Hashable
from contextlib import suppress
from http import HTTPStatus

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.infra.http_server import TURN, Turn, network_of

_PER_SECOND = 200
#: So many at once wait for nothing.
_BURST = 50
#: The longest wait; as many connections as a server has are answered in it.
_MOST_SECONDS = 10.0
#: Beyond so many, lines in which nobody waits are forgotten.
_LINES = 10_000
#: Orchestrators restart what doesn't answer them at once.
_PROBES = frozenset({"/healthz", "/readyz"})


class Lines:
    """Lines of requests, each served at the same steady rate."""

    def __init__(self) -> None:
        #: When the next turn of each line is.
        self._next: dict[Hashable, float] = {}

    def take(self, line: Hashable, turns: int = 1) -> float:
        """Take turns. Returns in how many seconds they begin; no line is longer than may be waited for."""
        now = time.monotonic()
        begins = max(self._next.get(line, 0.0), now - _BURST / _PER_SECOND)
        self._next[line] = min(begins + turns / _PER_SECOND, now + _MOST_SECONDS)
        if len(self._next) > _LINES:
            self._next = {line: at for line, at in self._next.items() if at > now}
        return max(0.0, begins - now)

    def give_back(self, line: Hashable, turns: int) -> None:
        """Return turns that were taken."""
        if line in self._next:
            self._next[line] -= turns / _PER_SECOND


async def take_turn(request: Request, workspace_id: int, *, vectors: bool, turns: int) -> None:
    """Wait for the turn of a workspace that has asked too often. A client that goes away meanwhile gives it back.

    Args:
        vectors: some are asked for, which costs a turn only if it is refused.
        turns: what another request costs.

    Raises:
        ClientDisconnect: the client went away.
    """
    lines: Lines = request.app.state.lines
    line = workspace_id, vectors
    if vectors:
        request.state.owes_refusals_to, turns = line, 0
    try:
        await _wait(request.scope, lines.take(line, turns))
    except ClientDisconnect:
        lines.give_back(line, turns)
        raise


async def _wait(scope: Scope, seconds: float) -> None:
    """Wait, and note in the request's state for how long; `ClientDisconnect` when the client goes away meanwhile."""
    if not seconds:
        return
    began = time.monotonic()
    turn: Turn = scope["state"].get(TURN) or Turn()
    is_there = await turn.come(seconds)
    scope["state"]["waited"] = time.monotonic() - began
    if not is_there:
        raise ClientDisconnect


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
                    line = network_of(scope["client"][0]) if scope.get("client") else ""
                    with suppress(ClientDisconnect):  # what is sent goes nowhere, and the turn has been used
                        await _wait(scope, self._lines.take(line))
                elif message["status"] >= HTTPStatus.BAD_REQUEST and (line := state.get("owes_refusals_to")):
                    self._lines.take(line)
            await send(message)

        await self._app(scope, receive, sending)
