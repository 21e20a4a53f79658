"""Rate limits of requests and tokens per minute: a refusal tells the true wait.

A minute lasts an hour here and passes when the test says so, so nothing depends on how busy the machine is.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import memory

from pipeline.api.gateway import rate_limits as limits_module
from pipeline.api.gateway.cache import Caller, GatewayCache
from pipeline.api.gateway.rate_limits import Limits, Window, _span
from pipeline.core.errors import RateLimited

MINUTE_SECONDS = 3_600


def caller(**limits: int) -> Caller:
    given = {"requests_per_minute": None, "tokens_per_minute": None, **limits}
    return Caller(key_id="k", workspace_id=7, admin=False, monthly_tokens=None, monthly_cost=None, **given)


class Counts:
    """Limits of a new process, in Valkey or, while it is away, in memory, with a clock that the test moves."""

    def __init__(self, url: str, store: "redis.Redis | None") -> None:
        self._url, self._store = url, store
        self.ahead_seconds = 0.0

    @asynccontextmanager
    async def made(self, minute_seconds: int) -> AsyncIterator[Limits]:
        """Yield the limits of a new process."""
        limits = Limits(self._url, cast(GatewayCache, None), minute_seconds)
        try:
            yield limits
        finally:
            await limits.close()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead_seconds += seconds
        if store := self._store:
            for key in store.keys("*"):
                left = store.pttl(key) - int(seconds * 1_000)
                store.pexpire(key, left) if left > 0 else store.delete(key)


@pytest.fixture(params=["valkey", "memory"])
def counts(request: pytest.FixtureRequest, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    # The store must answer in time, however busy the machine is.
    monkeypatch.setattr(limits_module, "_REDIS_SECONDS", 60)
    with redis.Redis.from_url(redis_url) as store:
        in_valkey = request.param == "valkey"
        made = Counts(redis_url if in_valkey else "redis://127.0.0.1:1/0", store if in_valkey else None)
        monkeypatch.setattr(memory, "time", SimpleNamespace(time=lambda: time.time() + made.ahead_seconds))
        yield made


def run(
    counts: Counts, body: Callable[[Limits], Coroutine[Any, Any, None]], minute_seconds: int = MINUTE_SECONDS
) -> None:
    async def within() -> None:
        async with counts.made(minute_seconds) as made:
            await body(made)

    asyncio.run(within())


async def refusal(limits: Limits, who: Caller, tokens: int = 1) -> RateLimited:
    """Use up the limit until a request is refused, and return the refusal."""
    for _ in range(1_000):
        try:
            await limits.charge(who, tokens)
        except RateLimited as refused:
            return refused
    raise AssertionError("nothing is refused")


@pytest.mark.parametrize("limit", [1, 7, 600])
def test_who_waits_as_told_is_let_through(counts: Counts, limit: int) -> None:
    async def body(made: Limits) -> None:
        who = caller(requests_per_minute=limit)
        for _ in range(3):
            told = (await refusal(made, who)).retry_after_seconds
            assert told
            assert told <= 2 * MINUTE_SECONDS + 0.1
            counts.wait(told)
            await made.charge(who, 1)

    run(counts, body)


def test_who_really_waits_as_told_is_let_through(counts: Counts) -> None:
    async def body(made: Limits) -> None:
        who = caller(requests_per_minute=7)
        for _ in range(2):
            await asyncio.sleep((await refusal(made, who)).retry_after_seconds or 0)
            await made.charge(who, 1)

    run(counts, body, minute_seconds=2)


def test_a_request_of_many_tokens_is_told_its_own_wait(counts: Counts) -> None:
    async def body(made: Limits) -> None:
        who = caller(tokens_per_minute=1_000)
        await made.charge(who, 900)
        with pytest.raises(RateLimited) as few:
            await made.charge(who, 200)
        with pytest.raises(RateLimited) as many:
            await made.charge(who, 1_000)
        assert few.value.retry_after_seconds
        assert many.value.retry_after_seconds
        assert few.value.retry_after_seconds < many.value.retry_after_seconds
        counts.wait(few.value.retry_after_seconds)
        await made.charge(who, 200)

    run(counts, body)


def _read_span(told: str) -> float:
    minutes, seconds, unit = re.fullmatch(r"(?:(\d+)m(?!s))?([\d.]+)(s|ms)", told).groups()  # type: ignore[union-attr]
    return 60 * int(minutes or 0) + float(seconds) / (1_000 if unit == "ms" else 1)


def test_all_is_free_when_the_reset_is_over(counts: Counts) -> None:
    async def body(made: Limits) -> None:
        who = caller(requests_per_minute=5)
        headers = await made.charge(who, 1)
        assert headers["x-ratelimit-remaining-requests"] == "4"
        # The reset is up to two minutes away, or less than one near the end of the period.
        counts.wait(_read_span(headers["x-ratelimit-reset-requests"]))
        for left in range(4, -1, -1):
            assert (await made.charge(who, 1))["x-ratelimit-remaining-requests"] == str(left)

    run(counts, body)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0ms"), (0.0121, "13ms"), (1.5, "1.5s"), (7.661, "7.67s"), (59.995, "60s"), (63, "1m3s"), (119.7, "2m0s")],
)
def test_a_span_is_told_in_full(seconds: float, told: str) -> None:
    assert _span(seconds) == told
    assert _read_span(told) >= seconds


@given(
    limit=st.integers(1, 1_000),
    previous=st.integers(0, 1_000),
    current=st.integers(0, 1_000),
    left=st.floats(0.001, 60),
    cost=st.integers(1, 1_000),
)
def test_a_wait_is_long_enough_and_no_longer(limit: int, previous: int, current: int, left: float, cost: int) -> None:
    """The wait holds by the library's own rule, at any time of a period."""
    previous, current, cost = min(previous, limit), min(current, limit), min(cost, limit)

    def passes(after: float) -> bool:
        if after < left:
            gone, now, share = previous, current, (left - after) / 60
        else:
            gone, now, share = current, 0, max(0.0, 60 - (after - left)) / 60
        return int(gone * share) + now + cost <= limit

    wait = Window(period_seconds=60, previous=previous, current=current, left_seconds=left).wait_seconds(limit, cost)
    assert passes(wait)
    assert wait == 0 or not passes(wait - 0.02)


def test_a_wait_is_long_enough_in_each_millisecond() -> None:
    """Valkey counts in milliseconds. The last one of a share still counts, so its wait isn't zero."""
    for left_ms in range(1, 2_000):
        current = 600 - 600 * left_ms // 2_000
        expires = (2_000 + left_ms) / 1_000
        window = Window(period_seconds=2, previous=600, current=current, left_seconds=expires - 2)
        then_ms = left_ms - int(1_000 * window.wait_seconds(600, 1))
        assert 600 * then_ms // 2_000 + current + 1 <= 600, left_ms


# Tokens charged and tokens used


def test_credit_is_spent_once(counts: Counts) -> None:
    """Concurrent requests can't spend the same credit."""

    async def body(made: Limits) -> None:
        who = caller(tokens_per_minute=1_000)
        await made.charge(who, 900)
        made.learn(who, "m", ["x"], 900, 400)  # 500 of them weren't used
        outcomes = await asyncio.gather(*(made.charge(who, 100) for _ in range(20)), return_exceptions=True)
        assert sum(not isinstance(outcome, RateLimited) for outcome in outcomes) == 6

    run(counts, body)


def test_a_refused_request_costs_nothing_and_what_was_taken_is_paid(counts: Counts) -> None:
    async def body(made: Limits) -> None:
        who = caller(tokens_per_minute=1_000)
        await made.charge(who, 950)
        made.learn(who, "m", ["x"], 950, 900)  # leaves a credit of 50
        for _ in range(3):
            with pytest.raises(RateLimited):
                await made.charge(who, 500)
        await made.charge(who, 100)
        made.learn(who, "m", ["x"], 100, 1_000_000)  # the debt is at most one limit
        assert made._credit[7] == -1_000
        counts.wait((await refusal(made, who)).retry_after_seconds or 0)
        await made.charge(who, 1)
        assert made._credit[7] == -1
        made.learn(who, "m", ["x"], 10**9, 0)
        assert made._credit[7] == 1_000

    run(counts, body)


@pytest.mark.parametrize("put", ["words", "set"])
def test_a_count_that_others_spoil_begins_anew(redis_url: str, put: str) -> None:
    async def body() -> None:
        made = Limits(redis_url, cast(GatewayCache, None), 60)
        who = caller(requests_per_minute=2)
        with redis.Redis.from_url(redis_url) as store:
            await made.charge(who, 1)
            for key in store.keys("*"):
                store.delete(key)
                store.set(key, "junk") if put == "words" else store.sadd(key, "junk")
            assert (await made.charge(who, 1))["x-ratelimit-remaining-requests"] == "1"
            assert (await made.charge(who, 1))["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(RateLimited):
                await made.charge(who, 1)
            # The count is shared: another process sees it.
            other = Limits(redis_url, cast(GatewayCache, None), 60)
            with pytest.raises(RateLimited):
                await other.charge(who, 1)
            await other.close()
        await made.close()

    asyncio.run(body())
