"""Answers that wait for their turn, on a clock that only waiting moves."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from pipeline.api.pacing import Paced

_BURST, _EACH = 50, 1 / 200


@dataclass
class _Caller:
    workspace_id: int


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["workspace"]:
        scope["state"]["caller"] = _Caller(scope["workspace"])
    await send({"type": "http.response.start", "status": scope["status"], "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask for answers at one moment, each of (workspace, status); returns how long each waits."""
    paced = Paced(_app)

    def ask(*asked: tuple[int | None, int]) -> list[float]:
        waited: list[float] = []

        async def sleep(seconds: float) -> None:
            waited[-1] = seconds

        async def send(_: Message) -> None:
            return

        async def body() -> None:
            for workspace, status in asked:
                waited.append(0.0)
                await paced({"type": "http", "workspace": workspace, "status": status}, send, send)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda: 1_000.0)
            patched.setattr(asyncio, "sleep", sleep)
            asyncio.run(body())
        return waited

    return ask


@pytest.mark.parametrize("one", [(None, 401), (None, 404), (None, 200), (7, 429), (7, 400)])
def test_a_crowd_waits_for_one_answer_after_the_other(waits: Any, one: tuple[int | None, int]) -> None:
    seconds = waits(*[one] * (_BURST + 100))
    assert not any(seconds[: _BURST + 1])
    assert seconds[_BURST + 1 :] == pytest.approx([n * _EACH for n in range(1, 100)])


def test_who_is_known_and_served_never_waits(waits: Any) -> None:
    assert not any(waits(*[(7, 200)] * 500))


@pytest.mark.parametrize("crowd", [(None, 401), (None, 200), (7, 429)])
def test_a_crowd_holds_up_no_other(waits: Any, crowd: tuple[int | None, int]) -> None:
    others = [one for one in [(None, 401), (None, 200), (7, 429), (8, 404), (8, 200)] if one != crowd]
    waits(*[crowd] * 1_000)
    assert not any(waits(*others))
