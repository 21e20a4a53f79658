"""Refusals, and answers to nobody that is known: so many a second. A crowd that asks again and again leaves the
processor to others."""

import asyncio
import time
from collections import defaultdict
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.http_server import PACED

_ANSWERS_PER_SECOND = 200
#: So many at once wait for nothing.
_BURST = 50


class Paced:
    """Lets such answers wait for their turn: each workspace's refusals by themselves, and of all who aren't known those
    and what is open to anybody. What is served to a known key is bounded by its limits, and never waits here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        #: When the next one goes out at the earliest, by workspace, and whether it is a refusal.
        self._next: defaultdict[tuple[int | None, bool], float] = defaultdict(float)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                caller, refused = state.get("caller"), message["status"] >= HTTPStatus.BAD_REQUEST
                if refused or caller is None:
                    state[PACED] = True
                    await self._turn((caller and caller.workspace_id, refused))
                    state[PACED] = False
            await send(message)

        await self._app(scope, receive, sending)

    async def _turn(self, line: tuple[int | None, bool]) -> None:
        now = time.monotonic()
        turn = max(self._next[line], now - _BURST / _ANSWERS_PER_SECOND)
        self._next[line] = turn + 1 / _ANSWERS_PER_SECOND
        if turn > now:
            await asyncio.sleep(turn - now)
