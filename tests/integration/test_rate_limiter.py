"""Rate limiter and circuit breaker of an upstream, shared by all senders through Redis. Times are the waits that it
returns, not time that passes."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from pipeline.core.models import Upstream
from tests.support.ports import free_port
from workers.upstream import rate_limiter
from workers.upstream.rate_limiter import Leave, RateLimiter, account_of, connect

_UPSTREAM = Upstream(
    url="https://example.org/v1",
    model="embed-1",
    reply_model=None,
    key_env="FAR_KEY",
    base64=True,
    request_inputs=8,
    request_tokens=1_000,
)
_PATIENCE = 30.0
#: Tolerance of waits, in seconds.
_A_MOMENT = 0.25


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stop the senders' clock, and let each call to Redis take a microsecond, however busy the machine is."""
    made = SimpleNamespace(now=time.time())
    shown = f"{{{int(made.now)}, redis.call('INCR', 'calls')}}"
    register = redis.Redis.register_script

    def register_still(client: "redis.Redis", script: str) -> Any:
        assert "redis.call('TIME')" in script
        return register(client, script.replace("redis.call('TIME')", shown))

    monkeypatch.setattr(redis.Redis, "register_script", register_still)
    monkeypatch.setattr(rate_limiter, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def store(redis_url: str) -> Iterator["redis.Redis"]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def sender(store: "redis.Redis") -> RateLimiter:
    return RateLimiter(store, _UPSTREAM)


def limits(requests: int = 0, tokens: int = 0) -> dict[str, str]:
    """Return headers with limits per minute."""
    said = {"requests": requests, "tokens": tokens}
    return {f"x-ratelimit-limit-{what}": str(limit) for what, limit in said.items() if limit}


def passed(sender: RateLimiter, headers: dict[str, str], tokens: int = 10) -> Leave:
    """Reserve a request and record it as passed."""
    leave = sender.reserve(tokens, _PATIENCE)
    assert leave.granted
    sender.passed(headers, tokens, tokens)
    return leave


def waits(sender: RateLimiter, count: int, tokens: int = 10) -> list[float]:
    """Reserve `count` requests at once and return the wait of each."""
    leaves = [sender.reserve(tokens, _PATIENCE) for _ in range(count)]
    assert all(leave.granted for leave in leaves)
    return [leave.wait_seconds for leave in leaves]


def test_nothing_is_held_back_before_a_limit_is_known(sender: RateLimiter) -> None:
    assert waits(sender, 50, 1_000_000) == [0] * 50
    assert sender.most_request_tokens == float("inf")


def test_a_limit_that_a_reply_shows_paces_all_senders(sender: RateLimiter, store: "redis.Redis") -> None:
    other = RateLimiter(store, _UPSTREAM)
    passed(sender, limits(requests=60))
    found = [each for _ in range(10) for each in (*waits(sender, 1), *waits(other, 1))]
    # Both senders together get 58.2 a minute, after one second's worth at once.
    assert found[-1] == pytest.approx(19 * 60 / 58.2, abs=2)
    assert all(later > earlier for earlier, later in pairwise(found[2:]))
    elsewhere = RateLimiter(store, replace(_UPSTREAM, model="embed-2"))
    assert waits(elsewhere, 5) == [0] * 5


def test_what_was_sent_before_the_limit_was_known_is_paid_back(sender: RateLimiter) -> None:
    assert waits(sender, 20) == [0] * 20
    sender.passed(limits(requests=60), 10, 10)
    assert sender.reserve(10, _PATIENCE).wait_seconds == pytest.approx(20 * 60 / 58.2, abs=_A_MOMENT)


def test_tokens_are_paced_and_corrected(sender: RateLimiter) -> None:
    passed(sender, limits(tokens=6_000), tokens=100)  # 97 a second
    assert sender.reserve(970, _PATIENCE).wait_seconds == pytest.approx(1, abs=_A_MOMENT)
    assert sender.reserve(100, _PATIENCE).wait_seconds == pytest.approx(11, abs=_A_MOMENT)
    sender.passed(limits(tokens=6_000), 970, 97)  # a tenth of the estimate
    assert sender.reserve(100, _PATIENCE).wait_seconds == pytest.approx(3, abs=_A_MOMENT)


@pytest.mark.parametrize(("requests", "tokens", "most"), [(0, 6_000, 97), (6_000, 6_000, 97), (6, 6_000, 1_000)])
def test_requests_are_made_as_large_as_both_limits_want_them(
    sender: RateLimiter, requests: int, tokens: int, most: float
) -> None:
    passed(sender, limits(requests, tokens))
    sender.reserve(1, _PATIENCE)
    assert sender.most_request_tokens == pytest.approx(most, rel=0.01)


def test_what_takes_too_long_reserves_nothing(sender: RateLimiter) -> None:
    passed(sender, limits(requests=6))
    waits(sender, 1)
    for _ in range(3):
        found = sender.reserve(10, 2.0)
        assert not found.granted
        assert found.wait_seconds == pytest.approx(2 * 60 / 5.82, abs=_A_MOMENT)


def test_all_wait_for_as_long_as_one_is_told(sender: RateLimiter, store: "redis.Redis") -> None:
    leave, other = sender.reserve(10, _PATIENCE), RateLimiter(store, _UPSTREAM)
    sender.refused(leave, {}, 10, 20.0)
    found = other.reserve(10, _PATIENCE)
    assert not found.granted
    assert found.wait_seconds == pytest.approx(20, abs=_A_MOMENT)
    for held in (other.held_seconds(), other.held_seconds(told=True)):
        assert held == pytest.approx(20, abs=_A_MOMENT)


def _rate(store: "redis.Redis", sender: RateLimiter) -> float:
    """Return the account's current rate, in requests per second."""
    store.hset(_key(), "told", 0)
    sender.reserve(0, 0.0)
    return sender._share.rates[0]


def _key() -> str:
    return f"vectormill:throttle:{account_of(_UPSTREAM, None)}"


def test_refusals_slow_down_and_time_speeds_up_again(sender: RateLimiter, store: "redis.Redis") -> None:
    early = passed(sender, limits(requests=600))
    leaves = [sender.reserve(10, _PATIENCE) for _ in range(3)]
    assert _rate(store, sender) == pytest.approx(9.7)
    for leave in (leaves[0], leaves[1], early):
        sender.refused(leave, {"x-ratelimit-remaining-requests": "0"}, 10, 2.0)
    assert _rate(store, sender) == pytest.approx(0.85 * 9.7, rel=0.02), "those under way then tell nothing new"
    _age(store, 2 + 5)
    assert _rate(store, sender) == pytest.approx((0.85 + 5 * 0.02) * 9.7, rel=0.02)
    _age(store, 30)
    assert _rate(store, sender) == pytest.approx(9.7, rel=0.02)


def _age(store: "redis.Redis", seconds: float) -> None:
    """Move the last refusals this many seconds into the past."""
    for what in ("requests", "tokens"):
        if cut := store.hget(_key(), f"{what}_cut_at"):
            store.hset(_key(), f"{what}_cut_at", float(str(cut)) - seconds)


def test_a_refusal_before_anything_came_through_only_waits(sender: RateLimiter, store: "redis.Redis") -> None:
    sender.refused(sender.reserve(300_000, _PATIENCE), {}, 300_000, 2.0)
    assert _rate(store, sender) == 0, "nothing tells a rate"
    assert waits(sender, 20, 300_000) == [0] * 20


def let_through_ten_a_second(sender: RateLimiter, store: "redis.Redis", clock: SimpleNamespace) -> None:
    """Pass 600 requests, as if over the last minute."""
    passed(sender, {}, 1_000)
    for _ in range(599):
        sender.passed({}, 1_000, 1_000)
    store.hset(_key(), "since", int(clock.now) - 60)


def test_refusals_one_after_the_other_slow_down_by_steps(
    sender: RateLimiter, store: "redis.Redis", clock: SimpleNamespace
) -> None:
    let_through_ten_a_second(sender, store, clock)
    sender.refused(sender.reserve(1_000, _PATIENCE), {}, 1_000, 1.0)
    measured = _rate(store, sender)
    assert measured == pytest.approx(0.85 * 10, rel=0.05)
    for times in (1, 2, 3):
        _age(store, 2)  # the wait is over
        before = _rate(store, sender)
        sender.refused(sender.reserve(1_000, _PATIENCE), {}, 1_000, 1.0)
        assert _rate(store, sender) == pytest.approx(0.85 * before, rel=0.05), f"{times} more, nothing in between"
    assert sender._share.rates[1] > 100, "tokens too"


def test_refusals_with_nothing_in_between_leave_the_rate_to_come_back_to(
    sender: RateLimiter, store: "redis.Redis", clock: SimpleNamespace
) -> None:
    let_through_ten_a_second(sender, store, clock)
    for _ in range(20):
        sender.refused(sender.reserve(1_000, _PATIENCE), {}, 1_000, 1.0)
        _age(store, 2)
    assert _rate(store, sender) < 0.2 * 10
    _age(store, 60)
    assert _rate(store, sender) == pytest.approx(0.97 * 10, rel=0.05)


def test_little_that_was_asked_for_is_not_taken_for_the_rate(
    sender: RateLimiter, store: "redis.Redis", clock: SimpleNamespace
) -> None:
    passed(sender, {}, 10)
    leaves = [sender.reserve(1_000, _PATIENCE) for _ in range(3)]
    store.hset(_key(), "since", int(clock.now) - 9)
    sender.refused(leaves[0], {}, 1_000, 1.0)
    _rate(store, sender)
    assert sender._share.rates[1] == pytest.approx(0.85 * 3_010 / 10 / 2, rel=0.05), "and not 1 a second"


def test_no_number_of_refusals_stops_a_request_for_good(sender: RateLimiter, store: "redis.Redis") -> None:
    passed(sender, {}, 1_000)
    for _ in range(60):
        sender.refused(sender.reserve(1_000, _PATIENCE), {}, 1_000, 0)
        _age(store, 1)
    assert _rate(store, sender) >= 0.85 / 60
    assert sender._share.rates[1] >= 0.85 * 1_000 / 60


def test_one_that_came_through_before_a_long_wait_is_not_taken_for_the_rate(
    sender: RateLimiter, store: "redis.Redis", clock: SimpleNamespace
) -> None:
    passed(sender, limits(requests=600))
    store.hdel(_key(), "requests_limit")
    store.hset(_key(), mapping={"requests_ceiling": 10, "requests_cut_to": 9.7, "requests_cut_at": int(clock.now) - 5})
    sender.refused(sender.reserve(10, _PATIENCE), {}, 10, 600.0)
    assert _rate(store, sender) == pytest.approx(0.85 * 9.7 / 2, rel=0.05)


def test_a_limit_that_is_learnt_after_refusals_heals_at_once(sender: RateLimiter, store: "redis.Redis") -> None:
    passed(sender, {}, 1_000)
    for _ in range(40):
        sender.refused(sender.reserve(1_000, _PATIENCE), {}, 1_000, 0)
        _age(store, 1)
    slow = [sender.reserve(1_000, 3_600.0).wait_seconds for _ in range(3)]
    assert slow[-1] > 20
    sender.passed(limits(requests=600, tokens=600_000), 1_000, 1_000)
    assert _rate(store, sender) == pytest.approx(9.7)
    assert sender.reserve(1_000, _PATIENCE).wait_seconds < 4, "what waits goes at the new rate"


def test_a_refusal_says_the_limit_too(sender: RateLimiter, store: "redis.Redis") -> None:
    leave = sender.reserve(900_000, _PATIENCE)
    assert sender.refused(leave, limits(requests=600, tokens=600_000), 900_000, 1.0), "it never comes through"
    assert sender.minute_tokens == pytest.approx(600_000)
    assert _rate(store, sender) == pytest.approx(0.85 * 9.7, rel=0.02)
    assert not sender.refused(leave, limits(requests=600, tokens=600_000), 500_000, 1.0)


def test_what_waits_moves_up_when_the_rate_grows(sender: RateLimiter, store: "redis.Redis") -> None:
    passed(sender, limits(requests=60))
    before = waits(sender, 20)[-1]
    sender.passed(limits(requests=600), 10, 10)
    assert sender.reserve(10, _PATIENCE).wait_seconds == pytest.approx(before / 10, abs=_A_MOMENT)


def test_no_count_of_tokens_stops_the_others_for_days(sender: RateLimiter) -> None:
    passed(sender, limits(tokens=6_000))
    sender.passed(limits(tokens=6_000), 10, 2**52)
    assert sender.reserve(10, 3_600.0).wait_seconds == pytest.approx(60, abs=1)


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "many"])
def test_a_limit_that_is_none_is_ignored(sender: RateLimiter, limit: str) -> None:
    passed(sender, {"x-ratelimit-limit-tokens": limit})
    assert waits(sender, 5) == [0] * 5
    assert sender.minute_tokens == float("inf")


def test_another_key_has_limits_of_its_own(store: "redis.Redis") -> None:
    old, new = RateLimiter(store, _UPSTREAM, "sk-one"), RateLimiter(store, _UPSTREAM, "sk-two")
    old.refused(old.reserve(10, _PATIENCE), {}, 10, 3_600.0)
    assert not old.reserve(10, _PATIENCE).granted
    assert new.reserve(10, _PATIENCE).granted
    assert not any("sk-" in name for name in store.keys("*"))


def test_only_the_limit_that_was_hit_slows_down(sender: RateLimiter, store: "redis.Redis") -> None:
    passed(sender, limits(600, 600_000))
    leave = sender.reserve(10, _PATIENCE)
    headers = {"x-ratelimit-remaining-requests": "40", "x-ratelimit-remaining-tokens": "3"}
    sender.refused(leave, headers, 10, 0)
    assert _rate(store, sender) == pytest.approx(9.7)
    assert sender._share.rates[1] == pytest.approx(0.85 * 9_700, rel=0.02)


def test_limits_are_found_where_no_header_tells_them(sender: RateLimiter, store: "redis.Redis") -> None:
    """The upstream lets 600 pass per minute and sends no limits: 600 at once, then a wait for the minute's end."""
    leaves = [sender.reserve(10, _PATIENCE) for _ in range(600)]
    for _ in leaves:
        sender.passed({}, 10, 10)
    sender.refused(leaves[-1], {}, 10, 60.0)
    ceiling = 600 / 60
    _age(store, 60)  # the wait is over
    assert _rate(store, sender) == pytest.approx(0.85 * ceiling, rel=0.05)
    _age(store, 30)
    assert _rate(store, sender) == pytest.approx(0.97 * ceiling, rel=0.05), "just below what was too much"
    _age(store, 60)
    assert _rate(store, sender) > 1.1 * ceiling, "and later on a little more, to see"


def test_the_breaker_lets_one_probe_through_and_then_all(sender: RateLimiter, store: "redis.Redis") -> None:
    leaves = [sender.reserve(10, _PATIENCE) for _ in range(8)]
    for leave in leaves:
        sender.failed(leave, None)
    assert 0 < sender.held_seconds() <= 1, "those under way when it opened don't count"
    assert sender.held_seconds(told=True) == 0
    for opened in (2, 4, 8, 16, 32, 60, 60):
        store.hset(_key(), "open", 0)
        probe, other = sender.reserve(10, _PATIENCE), sender.reserve(10, _PATIENCE)
        assert probe.granted
        assert not other.granted
        sender.failed(probe, None)
        assert sender.held_seconds() == pytest.approx(opened, abs=_A_MOMENT)
    store.hset(_key(), "open", 0)
    passed(sender, {})
    assert waits(sender, 5) == [0] * 5
    sender.failed(sender.reserve(10, _PATIENCE), None)
    assert sender.held_seconds() == 0, "it counts from the beginning"


def test_the_others_wait_as_long_as_a_probe_may_take(sender: RateLimiter, store: "redis.Redis") -> None:
    sender.request_seconds = 20.0
    for leave in [sender.reserve(10, _PATIENCE) for _ in range(5)]:
        sender.failed(leave, None)
    store.hset(_key(), "open", 0)
    assert sender.reserve(10, _PATIENCE).granted
    other = sender.reserve(10, _PATIENCE)
    assert not other.granted
    assert other.wait_seconds == pytest.approx(20, abs=_A_MOMENT)
    assert sender.opened == pytest.approx(time.time(), abs=60)
    sender.refused(other, {}, 10, 0)  # any answer closes the breaker
    assert sender.held_seconds() == 0


def test_nobody_waits_for_a_probe_that_is_not_sent(sender: RateLimiter, store: "redis.Redis") -> None:
    for leave in [sender.reserve(10, _PATIENCE) for _ in range(5)]:
        sender.failed(leave, None)
    sender.give_back(leave)
    assert sender.held_seconds() > 0, "what the breaker says holds"
    store.hset(_key(), "open", 0)
    probe = sender.reserve(10, _PATIENCE)
    assert not sender.reserve(10, _PATIENCE).granted
    sender.give_back(probe)
    assert sender.reserve(10, _PATIENCE).granted


def test_a_failure_between_successes_opens_nothing(sender: RateLimiter) -> None:
    for _ in range(20):
        sender.failed(sender.reserve(10, _PATIENCE), None)
        passed(sender, {})
    assert sender.held_seconds() == 0


def test_an_unavailable_gateway_says_how_long(sender: RateLimiter) -> None:
    sender.failed(sender.reserve(10, _PATIENCE), 12.0)
    assert sender.held_seconds(told=True) == pytest.approx(12, abs=_A_MOMENT)


def test_each_takes_its_share_while_redis_is_away(redis_url: str) -> None:
    with connect(redis_url) as store, connect(f"redis://127.0.0.1:{free_port()}/0") as nobody:
        senders = [RateLimiter(store, _UPSTREAM) for _ in range(4)]
        passed(senders[0], limits(requests=600))
        for each in senders:
            each.reserve(10, _PATIENCE)
        senders[3].reserve(10, _PATIENCE)
        senders[3].client = nobody
        # Four senders share 9.7 a second.
        found = waits(senders[3], 12)
        assert found[-1] - found[-2] == pytest.approx(4 / 9.7, rel=0.1)
        senders[3].refused(Leave(granted=True, wait_seconds=0), {}, 10, 5.0)
        assert not senders[3].reserve(10, _PATIENCE).granted
        assert senders[3].held_seconds() == pytest.approx(5, abs=_A_MOMENT)


def test_redis_is_asked_again_after_a_while(redis_url: str, clock: SimpleNamespace) -> None:
    with connect(redis_url) as store, connect(f"redis://127.0.0.1:{free_port()}/0") as nobody:
        sender = RateLimiter(nobody, _UPSTREAM)
        assert sender.reserve(10, _PATIENCE).granted
        sender.client = store
        sender.reserve(10, _PATIENCE)
        assert not store.exists(_key())
        clock.now += 3
        sender.reserve(10, _PATIENCE)
        assert store.exists(_key())


@pytest.mark.parametrize("spoil", ["key", "senders", "values", "infinite"])
def test_what_others_write_to_the_account_is_forgotten(sender: RateLimiter, store: "redis.Redis", spoil: str) -> None:
    passed(sender, limits(requests=60))
    key = f"vectormill:throttle:{account_of(_UPSTREAM, None)}"
    match spoil:
        case "key":
            store.set(key, "junk")
        case "senders":
            store.set(f"{key}:senders", "junk")
        case "values":
            store.hset(key, mapping={"requests_cut_at": "1", "requests_limit": "junk", "told": "junk"})
        case "infinite":
            store.hset(key, mapping={"told": "inf", "open": "1e300", "requests_free": "nan"})
    assert sender.reserve(10, _PATIENCE).granted
    assert sender.held_seconds() == 0
    passed(sender, limits(requests=60))
    assert sender.reserve(10, _PATIENCE).wait_seconds == pytest.approx(1, abs=1.5)
    assert store.type(key) == "hash"
