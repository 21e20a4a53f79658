"""Rate limits by delay, on a clock that stands still."""

import asyncio
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from pipeline.api.pacing import LeakyBuckets, Paced, take_turn
from pipeline.infra.http_server import TURN

_BURST, _EACH, _LONGEST = 50, 1 / 200, 10.0


@dataclass(frozen=True)
class _Ask:
    """One request: of a workspace, or of an unknown caller at an address."""

    status: int = 200
    workspace: int | None = None
    vectors: bool = False
    turns: int = 1
    host: str = "192.0.2.1"
    path: str = "/v1/models"
    stays: bool = True


class _Turn:
    """Turn of a connection, which records the wait that is asked of it."""

    def __init__(self, stays: bool) -> None:
        self.stays, self.seconds = stays, 0.0

    async def come(self, seconds: float) -> bool:
        self.seconds = seconds
        return self.stays


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    asked: _Ask = scope["asked"]
    status = asked.status
    if asked.workspace is not None:
        request = Request(scope)
        request.state.caller = asked.workspace
        try:
            await take_turn(request, asked.workspace, vectors=asked.vectors, turns=asked.turns)
        except ClientDisconnect:
            return
    await send({"type": "http.response.start", "status": status, "headers": []})


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes requests at one moment, and returns the wait and the start of the answer of each."""
    buckets = LeakyBuckets()
    paced, app = Paced(_app, buckets), SimpleNamespace(state=SimpleNamespace(buckets=buckets))

    def ask(*asked: _Ask) -> list[tuple[float, Message | None]]:
        found: list[tuple[float, Message | None]] = []

        async def receive() -> Message:
            raise AssertionError("nothing is read")

        async def body() -> None:
            for one in asked:
                turn = _Turn(one.stays)
                sent: list[Message] = []

                async def send(message: Message, sent: list[Message] = sent) -> None:
                    sent.append(message)

                scope = {"type": "http", "app": app, "asked": one, "path": one.path, "client": (one.host, 1)}
                await paced({**scope, "state": {TURN: turn}}, receive, send)
                found.append((turn.seconds, sent[0] if sent else None))

        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda: 1_000.0)
            asyncio.run(body())
        return found

    return ask


_LINES = [
    _Ask(401),
    _Ask(200),
    _Ask(401, host="192.0.2.2"),
    _Ask(200, workspace=7),
    _Ask(429, workspace=7, vectors=True),
    _Ask(404, workspace=8),
]


@pytest.mark.parametrize("one", _LINES)
def test_a_crowd_gets_one_turn_after_the_other(ask: Any, one: _Ask) -> None:
    seconds = [waited for waited, _ in ask(*[one] * (_BURST + 100))]
    assert not any(seconds[: _BURST + 1])
    assert seconds[_BURST + 1 :] == pytest.approx([n * _EACH for n in range(1, 100)])


def test_a_request_may_cost_several_turns(ask: Any) -> None:
    costly = _Ask(201, workspace=7, turns=10)
    seconds = [waited for waited, _ in ask(*[costly] * 26)]
    assert not any(seconds[:6])
    assert seconds[6:] == pytest.approx([n * 10 * _EACH for n in range(1, 21)])
    ask(*[replace(costly, stays=False)] * 100)
    ((waited, _),) = ask(costly)
    assert waited == pytest.approx(seconds[-1] + 10 * _EACH), "each gives back what it took"


@pytest.mark.parametrize("asked", [_Ask(200, workspace=7, vectors=True), _Ask(200, path="/healthz")])
def test_vectors_and_probes_dont_wait(ask: Any, asked: _Ask) -> None:
    assert not any(waited for waited, _ in ask(*[asked] * 500))


@pytest.mark.parametrize("crowd", [_LINES[0], *_LINES[2:]])
def test_a_crowd_holds_up_no_other(ask: Any, crowd: _Ask) -> None:
    ask(*[crowd] * 2_000)
    others = [one for one in [*_LINES[1:], _Ask(200, workspace=8, vectors=True)] if one != crowd]
    others = [
        one for one in others if one.workspace is not None or one.host != crowd.host or crowd.workspace is not None
    ]
    assert not any(waited for waited, _ in ask(*others))


@pytest.mark.parametrize("one", [_LINES[0], *_LINES[3:]])
def test_nobody_waits_for_longer_than_may_be(ask: Any, one: _Ask) -> None:
    seconds = [waited for waited, start in ask(*[one] * 5_000) if start]
    assert len(seconds) == 5_000, "each is answered"
    assert max(seconds) == pytest.approx(_LONGEST, abs=_EACH)


def test_good_vectors_wait_behind_refusals_and_fill_no_bucket(ask: Any) -> None:
    """A workspace that asks for more than the line's rate gets its own rate again once its refusals are over."""
    ask(*[_Ask(503, workspace=7, vectors=True)] * (_BURST + 100))
    good = [waited for waited, _ in ask(*[_Ask(200, workspace=7, vectors=True)] * 1_000)]
    assert good == pytest.approx([100 * _EACH] * 1_000)


def test_who_goes_away_before_it_is_answered_gives_the_turn_back(ask: Any) -> None:
    ask(*[_Ask(200, workspace=7)] * (_BURST + 1))
    assert max(waited for waited, _ in ask(*[_Ask(200, workspace=7, stays=False)] * 300)) == pytest.approx(_EACH)


def test_strangers_who_go_away_when_the_work_is_done_keep_their_bucket(ask: Any) -> None:
    ask(*[_Ask(401, stays=False)] * (_BURST + 300))
    ((waited, _),) = ask(_Ask(401))
    assert waited == pytest.approx(299 * _EACH + _EACH)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("a socket", "another", False),
    ],
)
def test_a_network_of_ipv6_has_one_bucket(ask: Any, one: str, other: str, is_same: bool) -> None:
    ask(*[_Ask(401, host=one)] * (_BURST + 100))
    ((waited, _),) = ask(_Ask(401, host=other))
    assert bool(waited) is is_same


def test_buckets_in_which_nobody_waits_are_forgotten() -> None:
    buckets = LeakyBuckets()
    for number in range(30_000):
        buckets.take(number)
    assert len(buckets._next) <= 10_000
