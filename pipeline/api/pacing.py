"""Rate limits by delay, so that no caller takes all processor time. Limits set for a workspace are checked besides.

Each workspace has a leaky bucket, by which a request is delayed before anything is done for it. Requests for vectors
are bounded by the workspace's limits and the engines' queues; only their refusals take turns, from a second bucket. An
unknown caller's answer is delayed by its network's bucket. Nobody is refused: a refusal would cost as much as the
answer, and be retried.
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
#: Burst of turns that pass without delay.
_BURST = 50
#: Longest delay. As many requests are answered in it, at the rate above, as a server has connections.
_MOST_SECONDS = 10.0
#: Number of buckets beyond which empty ones are dropped.
_BUCKETS = 10_000
#: Paths that are never delayed: orchestrators restart a process that doesn't answer at once.
_PROBES = frozenset({"/healthz", "/readyz"})


class LeakyBuckets:
    """Leaky buckets by caller, which all leak at the same steady rate."""

    def __init__(self) -> None:
        #: Caller → time of its next turn, by the monotonic clock.
        self._next: dict[Hashable, float] = {}

    def take(self, caller: Hashable, turns: int = 1) -> float:
        """Take turns for a caller, and return the seconds until they begin: at most the longest delay."""
        now = time.monotonic()
        begins = max(self._next.get(caller, 0.0), now - _BURST / _PER_SECOND)
        self._next[caller] = min(begins + turns / _PER_SECOND, now + _MOST_SECONDS)
        if len(self._next) > _BUCKETS:
            self._next = {caller: at for caller, at in self._next.items() if at > now}
        return max(0.0, begins - now)

    def give_back(self, caller: Hashable, turns: int) -> None:
        """Give back turns that were taken."""
        if caller in self._next:
            self._next[caller] -= turns / _PER_SECOND


async def take_turn(request: Request, workspace_id: int, *, vectors: bool, turns: int) -> None:
    """Wait for the turn of a workspace that asks too often. If the client disconnects meanwhile, give the turn back.

    Args:
        vectors: the request asks for vectors, and costs a turn only if it is refused.
        turns: cost of any other request.

    Raises:
        ClientDisconnect: the client went away.
    """
    buckets: LeakyBuckets = request.app.state.buckets
    caller = workspace_id, vectors
    if vectors:
        request.state.owes_refusals_to, turns = caller, 0
    try:
        await _wait(request.scope, buckets.take(caller, turns))
    except ClientDisconnect:
        buckets.give_back(caller, turns)
        raise


async def _wait(scope: Scope, seconds: float) -> None:
    """Wait, and record the delay in the request's state.

    Raises:
        ClientDisconnect: the client went away meanwhile.
    """
    if not seconds:
        return
    began = time.monotonic()
    turn: Turn = scope["state"].get(TURN) or Turn()
    is_there = await turn.come(seconds)
    scope["state"]["waited"] = time.monotonic() - began
    if not is_there:
        raise ClientDisconnect


class Paced:
    """Middleware that delays answers to unknown callers, and charges a turn for each refused request for vectors."""

    def __init__(self, app: ASGIApp, buckets: LeakyBuckets) -> None:
        self._app, self._buckets = app, buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if "caller" not in state:
                    caller = network_of(scope["client"][0]) if scope.get("client") else ""
                    with suppress(ClientDisconnect):  # the answer goes nowhere, but the turn stays used
                        await _wait(scope, self._buckets.take(caller))
                elif message["status"] >= HTTPStatus.BAD_REQUEST and (caller := state.get("owes_refusals_to")):
                    self._buckets.take(caller)
            await send(message)

        await self._app(scope, receive, sending)
