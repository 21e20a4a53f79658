"""Requests and tokens a minute, in minutes of two seconds: what a refusal tells is true."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pipeline.api.directory import Caller, Directory
from pipeline.api.limits import Limits, Window
from pipeline.errors import RateLimited

MINUTE_SECONDS = 2


def caller(**limits: int) -> Caller:
    given = {"requests_per_minute": None, "tokens_per_minute": None, **limits}
    return Caller(key_id="k", workspace_id=7, admin=False, monthly_tokens=None, monthly_cost=None, **given)


@pytest.fixture(params=["valkey", "memory"])
def limits(request: pytest.FixtureRequest, redis_url: str) -> Callable[[int], Any]:
    """A new process's limits, in Valkey or while it is away."""

    @asynccontextmanager
    async def made(minute_seconds: int) -> AsyncIterator[Limits]:
        url = redis_url if request.param == "valkey" else "redis://127.0.0.1:1/0"
        limits = Limits(url, cast(Directory, None), minute_seconds)
        try:
            yield limits
        finally:
            await limits.close()

    return made


def run(
    limits: Callable[[int], Any],
    body: Callable[[Limits], Coroutine[Any, Any, None]],
    minute_seconds: int = MINUTE_SECONDS,
) -> None:
    async def within() -> None:
        async with limits(minute_seconds) as made:
            await body(made)

    asyncio.run(within())


async def refusal(limits: Limits, who: Caller, tokens: int = 1) -> RateLimited:
    """Use up what is left, until a request is refused."""
    for _ in range(1_000):
        try:
            await limits.charge(who, tokens)
        except RateLimited as refused:
            return refused
    raise AssertionError("nothing is refused")


@pytest.mark.parametrize("limit", [1, 7, 600])
def test_who_waits_as_told_is_let_through(limits: Callable[[int], Any], limit: int) -> None:
    async def body(made: Limits) -> None:
        who = caller(requests_per_minute=limit)
        for _ in range(3):
            refused = await refusal(made, who)
            told = refused.retry_after_seconds
            assert told is not None  # it may be over by now
            assert told <= 2 * MINUTE_SECONDS + 0.1
            await asyncio.sleep(told)
            await made.charge(who, 1)

    run(limits, body)


def test_a_request_of_many_tokens_is_told_its_own_wait(limits: Callable[[int], Any]) -> None:
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
        await asyncio.sleep(few.value.retry_after_seconds)
        await made.charge(who, 200)

    run(limits, body)


def test_all_is_free_when_the_reset_is_over(limits: Callable[[int], Any]) -> None:
    async def body(made: Limits) -> None:
        who = caller(requests_per_minute=5)
        headers = await made.charge(who, 1)
        assert headers["x-ratelimit-remaining-requests"] == "4"
        reset = headers["x-ratelimit-reset-requests"]
        await asyncio.sleep(float(reset[:-2]) / 1_000 if reset.endswith("ms") else float(reset[:-1]) + 0.01)
        for left in range(4, -1, -1):
            assert (await made.charge(who, 1))["x-ratelimit-remaining-requests"] == str(left)

    run(limits, body)


@given(
    limit=st.integers(1, 1_000),
    previous=st.integers(0, 1_000),
    current=st.integers(0, 1_000),
    left=st.floats(0.001, 60),
    cost=st.integers(1, 1_000),
)
def test_a_wait_is_long_enough_and_no_longer(limit: int, previous: int, current: int, left: float, cost: int) -> None:
    """By the library's own rule, at any time of a period."""
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


# Tokens charged and tokens taken


def test_credit_is_spent_once(limits: Callable[[int], Any]) -> None:
    """However many requests ask at the same time."""

    async def body(made: Limits) -> None:
        who = caller(tokens_per_minute=1_000)
        await made.charge(who, 900)
        made.learn(who, "m", ["x"], 900, 400)  # 500 of them weren't taken
        outcomes = await asyncio.gather(*(made.charge(who, 100) for _ in range(20)), return_exceptions=True)
        assert sum(not isinstance(outcome, RateLimited) for outcome in outcomes) == 6

    run(limits, body, minute_seconds=3_600)


def test_a_refused_request_costs_nothing_and_what_was_taken_is_paid(limits: Callable[[int], Any]) -> None:
    async def body(made: Limits) -> None:
        who = caller(tokens_per_minute=1_000)
        await made.charge(who, 950)
        made.learn(who, "m", ["x"], 950, 900)  # 50 are to the good
        for _ in range(3):
            with pytest.raises(RateLimited):
                await made.charge(who, 500)
        await made.charge(who, 100)
        made.learn(who, "m", ["x"], 100, 1_000_000)  # at most one limit is owed
        assert made._credit[7] == -1_000
        await asyncio.sleep((await refusal(made, who)).retry_after_seconds or 0)
        await made.charge(who, 1)
        assert made._credit[7] == -1
        made.learn(who, "m", ["x"], 10**9, 0)
        assert made._credit[7] == 1_000

    run(limits, body)


@pytest.mark.parametrize("put", ["words", "set"])
def test_a_count_that_others_spoil_begins_anew(redis_url: str, put: str) -> None:
    async def body() -> None:
        made = Limits(redis_url, cast(Directory, None), 60)
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
            # Counted by all: another process knows it.
            other = Limits(redis_url, cast(Directory, None), 60)
            with pytest.raises(RateLimited):
                await other.charge(who, 1)
            await other.close()
        await made.close()

    asyncio.run(body())
