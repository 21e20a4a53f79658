"""Upstream failures: transient ones are retried until a deadline, those that need a person pause the jobs."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.canary import CANARY
from pipeline.core.errors import GatewayBusy, GatewayRefused
from tests.integration.gateway.world import World
from tests.support.jobs_made import count, make_job, run_sql, taken
from tests.support.ports import free_port
from tests.support.scripted_gateway import Answer, ScriptedGateway, error, good, hanging, trickling
from workers.upstream import encoder as client
from workers.upstream import requests
from workers.upstream.rate_limiter import RateLimiter, account_of, connect


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, "rate_limited", retry_after_ms="30"),
        error(503, retry_after="0"),
        error(500),
        error(502),
        error(408),
        None,
    ],
    ids=lambda trouble: str(trouble[0]) if trouble else "cut",
)
def test_what_passes_is_waited_for(world: World, far: ScriptedGateway, trouble: Answer | None) -> None:
    fails = random.Random(2)
    far.answer = lambda asked: trouble if fails.random() < 0.25 else good(asked)
    world.run()
    world.must_be_done()
    assert count(world.engine, "claim_losses") == 0


def test_a_long_wait_gives_the_chunk_back_after_what_was_paid_for(world: World, far: ScriptedGateway) -> None:
    answers = iter([True, True, True])
    far.answer = lambda asked: good(asked) if next(answers, False) else error(429, retry_after="3600")
    with pytest.raises(GatewayBusy):
        world.run()
    chunk = world.chunk
    assert (chunk["state"], chunk["embedded"], chunk["crashes"]) == ("pending", 16, 0)
    (wait,) = run_sql(world.engine, "select extract(epoch from not_before - now()) from vectormill.chunks")
    assert 3_500 < wait[0] <= 3_700
    assert world.statuses() == {"ok", "429"}


def test_an_endpoint_that_is_dead_gives_the_chunk_back(world: World, far: ScriptedGateway) -> None:
    assert world.model.upstream
    dead = replace(world.model, upstream=replace(world.model.upstream, url=f"http://127.0.0.1:{free_port()}/v1"))
    with pytest.raises(GatewayBusy, match="can't be reached"):
        world.run(model=dead)
    assert world.chunk["state"] == "pending"
    assert run_sql(world.engine, "select sum(coalesce(billed_tokens, -1)) from vectormill.attempts") == [(0,)]


def test_a_claim_that_finds_the_breaker_open_sends_the_canary(world: World, far: ScriptedGateway) -> None:
    assert world.model.upstream
    world.run()
    with connect(world.redis_url) as redis:
        other = RateLimiter(redis, world.model.upstream, key="sk-one")
        for leave in [other.reserve(10, 1.0) for _ in range(5)]:
            other.failed(leave, None)
        redis.hset(f"vectormill:throttle:{account_of(world.model.upstream, 'sk-one')}", "open", 0)  # the wait is over
    far.requests.clear()
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert [request["input"] for request in far.requests] == [[CANARY], ["text 0"]]


@pytest.mark.parametrize(
    ("answer", "reason", "word"),
    [
        (error(401, "invalid_api_key"), "key_refused", "FAR_KEY"),
        (error(403), "key_refused", "403"),
        (error(402), "budget_spent", "402"),
        (error(429, "insufficient_quota"), "budget_spent", "insufficient_quota"),
        (error(404, "model_not_found"), "gateway_refused", "model_not_found"),
        (error(400), "gateway_refused", "400"),
        ((302, {"location": "http://127.0.0.1:1/"}, {}), "gateway_refused", "302"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_what_a_person_must_mend(world: World, far: ScriptedGateway, answer: Answer, reason: str, word: str) -> None:
    world.run()  # so that the canary is known, and the chunk's own requests meet the failure
    run_sql(world.engine, "delete from vectormill.embeddings")
    run_sql(world.engine, "update vectormill.chunks set state = 'pending', embedded = 0, prompt_tokens = 0")
    passing = iter([True])
    far.answer = lambda asked: good(asked) if next(passing, False) else answer
    with pytest.raises(GatewayRefused, match=word) as refused:
        world.run()
    assert refused.value.reason == reason
    assert "quotes" not in str(refused.value)
    assert (world.chunk["state"], world.chunk["embedded"]) == ("pending", 8), "what was paid for is committed"


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-more: ",
        b"",
    ],
    ids=["body", "packed body", "headers", "status"],
)
def test_an_answer_that_trickles_is_given_up(world: World, far: ScriptedGateway, begin: bytes) -> None:
    slow = iter([True])
    far.answer = lambda asked: trickling(begin) if next(slow, False) else good(asked)
    world.run(seconds=1.0)
    world.must_be_done()
    unanswered = "from vectormill.attempts where billed_tokens is null"
    assert run_sql(world.engine, f"select count(*), max(finished_at - started_at) < '3 s' {unanswered}") == [(1, True)]


def test_a_gateway_that_fails_gets_more_and_more_time(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(500)
    waits = []
    for _ in range(6):
        with pytest.raises(GatewayBusy, match="500") as busy:
            world.run()
        waits.append(busy.value.wait_seconds)
        run_sql(world.engine, "update vectormill.chunks set not_before = null")
        with connect(world.redis_url) as redis:
            redis.flushdb()
    assert waits == [4, 8, 16, 32, 60, 60]
    assert world.rejects() == []


def test_a_slow_pace_is_no_reason_to_give_up(
    world: World, far: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 3.0)
    far.answer = lambda asked: good(asked, x_ratelimit_limit_requests="60")
    world.run()
    world.must_be_done()
    # Six requests, one second apart.
    ((seconds,),) = run_sql(world.engine, "select sum(device_seconds) from vectormill.usage")
    ((taken_seconds,),) = run_sql(
        world.engine, "select extract(epoch from max(finished_at) - min(started_at)) from vectormill.attempts"
    )
    assert 4 < seconds < float(taken_seconds) + 1, "waits for the limits make the rate"


def test_a_key_that_is_rotated_under_way(
    world: World, far: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, valid = tmp_path / "key", ["Bearer sk-one"]
    key.write_text("sk-one\n")
    monkeypatch.delenv("FAR_KEY")
    monkeypatch.setenv("FAR_KEY_FILE", str(key))

    def answer(asked: dict[str, Any]) -> Answer:
        if len(far.requests) == 3:
            key.write_text("sk-two\n")
            valid[0] = "Bearer sk-two"
        return good(asked) if far.keys[-1] == valid[0] else error(401, "invalid_api_key")

    far.answer = answer
    world.run()
    world.must_be_done()
    assert world.statuses() == {"ok", "401"}


def _an_error(status: int, sent: list[int], *, endless: bool) -> Iterator[bytes]:
    head = f"HTTP/1.1 {status} No\r\nretry-after: 3000\r\ncontent-length: 1000000000000\r\n\r\n<html>"
    yield head.encode()
    while endless:
        sent[0] += 30_000
        yield b"<p>" * 10_000
    yield from hanging()


@pytest.mark.parametrize("endless", [True, False])
def test_an_error_counts_however_its_page_goes_on(world: World, far: ScriptedGateway, endless: bool) -> None:
    sent = [0]
    far.answer = lambda asked: _an_error(429, sent, endless=endless)
    with pytest.raises(GatewayBusy, match="answers 429") as busy:
        world.run(seconds=60.0 if endless else 2.0)
    assert busy.value.wait_seconds == pytest.approx(3_000, abs=60)
    assert sent[0] < 100_000_000, "of a long page no more than a bit is read"


def test_refusals_that_tell_no_wait_are_not_answered_at_once(
    world: World, far: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.redis_url = f"redis://127.0.0.1:{free_port()}/0"
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(requests, "_REST_SECONDS", 0.1)
    far.answer = lambda asked: error(429, retry_after="0")
    with pytest.raises(GatewayBusy, match="429"):
        world.run()
    assert len(far.requests) < 15


def test_the_key_is_read_anew_for_each_chunk(
    world: World, far: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-two\n")
    monkeypatch.delenv("FAR_KEY")
    monkeypatch.setenv("FAR_KEY_FILE", str(key))
    far.keys.clear()
    world.run()
    assert set(far.keys) == {"Bearer sk-two"}
    key.unlink()
    with pytest.raises(GatewayRefused, match="set FAR_KEY, or FAR_KEY_FILE"):
        world.run(taken(world.engine, make_job(world.engine, world.model, 4)))
    assert "sk-" not in os.environ.get("FAR_KEY", "")


def test_redis_may_be_away(world: World, far: ScriptedGateway) -> None:
    world.redis_url = f"redis://127.0.0.1:{free_port()}/0"
    answers = iter([False, True])
    far.answer = lambda asked: good(asked) if next(answers, True) else error(429, retry_after_ms="50")
    world.run()
    world.must_be_done()
    assert world.statuses() == {"ok", "429"}
