"""Chunks through gateways of all kinds, on real Postgres and Redis, over real connections."""

import base64
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from pipeline import status
from pipeline.canary import CANARY
from pipeline.catalog import add_gateway, find_model, workspace_id
from pipeline.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.jobs import Claim, Model, Upstream
from pipeline.store import attempts as store_attempts
from tests.jobs_made import chunk_rows, count, make_job, run_sql, taken
from tests.ports import free_port
from tests.scripted_gateway import (
    DIMENSIONS,
    Answer,
    ScriptedGateway,
    error,
    good,
    hanging,
    scripted_gateway,
    trickling,
    vector_of,
)
from workers import gateway as client
from workers import memory as remembering
from workers import requests
from workers.attempts import Attempts
from workers.connection import Connection
from workers.gateway import GatewayEncoder
from workers.inquiry import describe
from workers.memory import Memory
from workers.run_chunk import Watch, run_chunk
from workers.throttle import Throttle, account_of, connect

_ITEMS = 40


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_REST_SECONDS", 0.005)
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setenv("FAR_KEY", "sk-one")


@pytest.fixture
def far() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as made:
        yield made


class World:
    """A job of `_ITEMS` items in one chunk, whose model is behind a gateway."""

    def __init__(self, engine: Engine, redis_url: str, far: ScriptedGateway) -> None:
        self.engine, self.redis_url = engine, redis_url
        asked = Upstream(
            url=far.url,
            model="embed-1",
            reply_model=None,
            key_env="FAR_KEY",
            base64=True,
            request_inputs=8,
            request_tokens=100_000,
        )
        with engine.begin() as connection:
            add_gateway(connection, "far", asked, describe(asked))
            self.model = find_model(connection, workspace_id(connection), "far")
        self.memory = Memory()
        self.job = make_job(engine, self.model, _ITEMS, per_chunk=_ITEMS)
        far.requests.clear()

    def run(
        self,
        claim: Claim | None = None,
        *,
        model: Model | None = None,
        seconds: float = 5.0,
        watch: Watch | None = None,
    ) -> None:
        """Run the chunk as a worker does."""
        model = model or self.model
        assert model.upstream
        claim = claim or taken(self.engine, self.job)
        watch = watch or Watch(60, 60)
        attempts = Attempts(self.engine, claim, model.name, watch)
        with Connection(model.upstream, seconds=seconds, in_flight=3) as connection, connect(self.redis_url) as redis:
            throttle = Throttle(redis, model.upstream, request_seconds=seconds)
            encoder = GatewayEncoder(model, connection, throttle, attempts, self.memory, in_flight=3)
            run_chunk(self.engine, encoder, claim, watch, on_hang=lambda: None)

    @property
    def chunk(self) -> dict[str, Any]:
        """Where the chunk stands."""
        (row,) = chunk_rows(self.engine, self.job)
        return dict(row)

    def must_be_done(self, embedded: int = _ITEMS) -> None:
        """All items are settled, and those embedded have their own vector."""
        chunk = self.chunk
        assert (chunk["state"], chunk["embedded"], chunk["crashes"]) == ("done", embedded, 0)
        rows = run_sql(self.engine, "select index, vector::real[], tokens from vectormill.embeddings order by index")
        assert len(rows) == embedded
        for index, vector, _ in rows:
            np.testing.assert_allclose(vector, vector_of(f"text {index}"), atol=1e-6)

    def rejects(self) -> list[tuple[int, str]]:
        """What was rejected."""
        return [(row[0], row[1]) for row in run_sql(self.engine, "select index, code from vectormill.rejects")]

    def statuses(self) -> set[str]:
        """How the attempts went."""
        return {row[0] for row in run_sql(self.engine, "select distinct status from vectormill.attempts")}


@pytest.fixture
def world(engine: Engine, redis_url: str, far: ScriptedGateway) -> World:
    return World(engine, redis_url, far)


def test_texts_go_out_packed_and_come_back_in_their_order(world: World, far: ScriptedGateway) -> None:
    far.connections.clear()
    world.run()
    world.must_be_done()
    assert [request["input"] for request in far.requests if request["input"] == [CANARY]] == [[CANARY]]
    sizes = [len(request["input"]) for request in far.requests[1:]]
    assert sizes == [8] * 5
    assert all(request["encoding_format"] == "base64" for request in far.requests)
    assert set(far.keys) == {"Bearer sk-one"}
    assert len(far.connections) <= 3, "connections are kept alive"
    # The gateway's own counts: two words a text, eleven the canary.
    assert run_sql(world.engine, "select prompt_tokens from vectormill.usage") == [(2 * _ITEMS,)]
    assert run_sql(world.engine, "select sum(billed_tokens) from vectormill.attempts") == [(2 * _ITEMS + 11,)]
    assert world.statuses() == {"ok"}


def test_results_are_placed_by_index(world: World, far: ScriptedGateway) -> None:
    def shuffled(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        random.Random(1).shuffle(body["data"])
        return status, headers, body

    far.answer = shuffled
    world.run()
    world.must_be_done()


def test_floats_where_base64_is_ignored_or_refused(engine: Engine, redis_url: str, far: ScriptedGateway) -> None:
    far.answer = lambda asked: good({**asked, "encoding_format": "float"})
    World(engine, redis_url, far).run()
    far.answer = lambda asked: error(400) if asked["encoding_format"] == "base64" else good(asked)
    assert describe(_upstream(far))["base64"] is False


def _upstream(far: ScriptedGateway) -> Upstream:
    return Upstream(
        url=far.url,
        model="embed-1",
        reply_model=None,
        key_env=None,
        base64=True,
        request_inputs=8,
        request_tokens=1_000,
    )


def _with(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Answer]:
    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        if asked["input"] != [CANARY]:
            changed = change(body)
            body = body if changed is None else changed
        return status, headers, body

    return answer


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["data"][-1].update(fields)


def test_a_broken_reply_is_never_written(world: World, far: ScriptedGateway) -> None:
    # All but the canary's are broken: then it's the texts that the gateway can't answer.
    far.answer = _with(_set(embedding=[0.5] * (DIMENSIONS - 1)))
    assert world.model.upstream
    world.run(model=replace(world.model, upstream=replace(world.model.upstream, request_inputs=4)))
    assert count(world.engine, "embeddings") == 0
    assert {code for _, code in world.rejects()} == {"gateway_failed"}
    assert world.statuses() == {"ok", "200"}


def test_no_reply_brings_vectors_of_the_wrong_texts(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(_set(index=0))  # right for single texts only, and so they go out in the end
    world.run()
    world.must_be_done()


def test_replies_that_are_always_broken_pause_the_jobs(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: (200, {}, {**good(asked)[2], "data": []})
    with pytest.raises(GatewayRefused, match="can't be used: it holds 0 vectors for 1") as refused:
        world.run()
    assert refused.value.reason == "gateway_refused"
    assert world.chunk["embedded"] == world.chunk["rejected"] == 0


def test_now_and_then_a_broken_reply_is_asked_again(world: World, far: ScriptedGateway) -> None:
    broken = iter([True, False, True, True] + [False] * 100)
    far.answer = lambda asked: (200, {}, b"oops") if next(broken) else good(asked)
    world.run()
    world.must_be_done()


def test_another_models_vectors_are_refused(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: good({**asked, "model": "embed-2"})
    with pytest.raises(GatewayRefused, match="another model than embed-1"):
        world.run()
    assert count(world.engine, "embeddings") == 0
    assert run_sql(world.engine, "select sum(billed_tokens) from vectormill.attempts") == [(11,)], "it was paid"


def test_another_canary_is_another_model(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: good({**asked, "input": [text + "!" for text in asked["input"]]})
    with pytest.raises(GatewayChanged, match="canary") as changed:
        world.run()
    assert changed.value.reason == "gateway_refused"
    assert count(world.engine, "embeddings") == 0


@pytest.mark.parametrize(("bad", "times"), [(np.nan, 2), (np.nan, 1_000), (0.0, 2)])
def test_a_canary_that_is_no_vector_is_no_other_model(
    world: World, far: ScriptedGateway, bad: float, times: int
) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        if len(far.requests) <= times:
            body["data"][0]["embedding"] = base64.b64encode(np.full(DIMENSIONS, bad, "<f4").tobytes()).decode()
        return status, headers, body

    far.answer = answer
    if times == 2:
        world.run()
        world.must_be_done()
    else:
        with pytest.raises(GatewayRefused, match="can't be used: it holds a vector that is zero or not finite"):
            world.run()
        assert world.chunk["embedded"] == world.chunk["rejected"] == 0


def test_a_name_that_the_gateway_gave_before_is_no_other_model(
    engine: Engine, redis_url: str, far: ScriptedGateway
) -> None:
    far.answer = lambda asked: good({**asked, "model": "embed-1-2026-01-31"})
    world = World(engine, redis_url, far)
    world.run()
    world.must_be_done()


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
        other = Throttle(redis, world.model.upstream, key="sk-one")
        for leave in [other.reserve(10, 1.0) for _ in range(5)]:
            other.failed(leave, None)
        redis.hset(f"vectormill:throttle:{account_of(world.model.upstream, 'sk-one')}", "open", 0)  # a second later
    far.requests.clear()
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert [request["input"] for request in far.requests] == [[CANARY], ["text 0"]]


def test_one_text_that_is_refused_is_rejected_alone(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(400) if "text 13" in asked["input"] else good(asked)
    world.run()
    world.must_be_done(_ITEMS - 1)
    assert world.rejects() == [(13, "gateway_refused")]
    (message,) = run_sql(world.engine, "select message from vectormill.rejects")
    assert message == ("the gateway answers 400 some_error",), "nothing of what it quotes"


def test_one_text_that_breaks_the_gateway_is_rejected_alone(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(500) if "text 13" in asked["input"] else good(asked)
    world.run()
    world.must_be_done(_ITEMS - 1)
    assert world.rejects() == [(13, "gateway_failed")]


_NAN = base64.b64encode(np.full(DIMENSIONS, np.nan, "<f4").tobytes()).decode()
_ZERO = base64.b64encode(np.zeros(DIMENSIONS, "<f4").tobytes()).decode()


@pytest.mark.parametrize("bad", [_NAN, _ZERO], ids=["nan", "zero"])
def test_texts_whose_vectors_are_always_bad_are_rejected(world: World, far: ScriptedGateway, bad: str) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        for row, text in zip(body["data"], asked["input"], strict=True):
            row["embedding"] = bad if text in ("text 7", "text 8", "text 30") else row["embedding"]
        return status, headers, body

    far.answer = answer
    world.run(watch=Watch(60, 60, commit_seconds=0))
    world.must_be_done(_ITEMS - 3)
    assert sorted(world.rejects()) == [(7, "bad_vector"), (8, "bad_vector"), (30, "bad_vector")]
    assert [request["input"] for request in far.requests].count([CANARY]) == 1 + 3 * 2, "asked twice for each"


def test_vectors_that_are_bad_for_a_while_convict_nobody(world: World, far: ScriptedGateway) -> None:
    """The canary comes through, and whole requests don't."""
    times: list[int] = []

    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        if asked["input"] != [CANARY] and len(times) < 30:
            times.append(len(asked["input"]))
            body["data"] = [{**row, "embedding": _NAN} for row in body["data"]]
        return status, headers, body

    far.answer = answer
    world.run()
    world.must_be_done()
    assert len(times) == 30


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
    world.run()  # the canary is known by now, so that the chunk's own requests meet it
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


def test_a_text_on_which_the_gateway_hangs_is_rejected_alone(
    world: World, far: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.5)
    far.answer = lambda asked: hanging() if "text 13" in asked["input"] else good(asked)
    world.run(seconds=0.8)
    world.must_be_done(_ITEMS - 1)
    assert world.rejects() == [(13, "gateway_failed")]


@pytest.mark.parametrize("status", [502, 503, 504, None], ids=str)
def test_a_text_for_which_the_gateway_goes_away_is_rejected_alone(
    world: World, far: ScriptedGateway, status: int | None
) -> None:
    def answer(asked: dict[str, Any]) -> Answer | None:
        if "text 0" not in asked["input"]:
            return good(asked)
        return error(status) if status else None

    world.run()  # the canary is known
    far.answer = answer
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert world.rejects() == [(0, "gateway_failed")], "though nothing else came through"


def test_a_text_that_fails_for_a_while_is_embedded(world: World, far: ScriptedGateway) -> None:
    fails = iter([True] * 4)
    far.answer = lambda asked: error(503) if asked["input"] == ["text 0"] and next(fails, False) else good(asked)
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert world.rejects() == []
    assert count(world.engine, "embeddings") == 1


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
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 1.5)
    far.answer = lambda asked: good(asked, x_ratelimit_limit_requests="60")
    world.run()
    world.must_be_done()
    # Six requests, a second apart.
    ((seconds,),) = run_sql(world.engine, "select sum(device_seconds) from vectormill.usage")
    ((taken_seconds,),) = run_sql(
        world.engine, "select extract(epoch from max(finished_at) - min(started_at)) from vectormill.attempts"
    )
    assert 4 < seconds < float(taken_seconds) + 1, "waits for the limits make the rate"


def test_what_was_paid_for_is_committed_while_more_is_under_way(world: World, far: ScriptedGateway) -> None:
    seen: list[int] = []

    def answer(asked: dict[str, Any]) -> Answer:
        seen.append(count(world.engine, "embeddings"))
        return good(asked)

    far.answer = answer
    watch = Watch(60, 60, commit_seconds=0)
    world.run(watch=watch)
    world.must_be_done()
    assert max(seen) >= 8
    parts = run_sql(world.engine, "select part, items from vectormill.usage order by part")
    assert [part for part, _ in parts] == list(range(len(parts)))
    assert sum(items for _, items in parts) == _ITEMS
    assert len(parts) >= 3
    assert run_sql(world.engine, "select sum(prompt_tokens) from vectormill.usage") == [(2 * _ITEMS,)]


def test_a_cancelled_chunk_awaits_what_is_under_way_between_commits(world: World, far: ScriptedGateway) -> None:
    watch = Watch(60, 60, commit_seconds=0)
    all_are_out = threading.Event()

    def held(asked: dict[str, Any]) -> Iterator[bytes]:
        all_are_out.wait(10)
        body = json.dumps(good(asked)[2]).encode()
        yield b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)

    def answer(asked: dict[str, Any]) -> Answer | Iterator[bytes]:
        if len(far.requests) == 4:  # the canary's, and three more
            watch.cancelled = True
            all_are_out.set()
        return good(asked) if asked["input"] == [CANARY] else held(asked)

    far.answer = answer
    world.run(watch=watch)
    assert (world.chunk["state"], world.chunk["embedded"]) == ("cancelled", 24)


def test_a_gateway_that_breaks_later_convicts_nobody(world: World, far: ScriptedGateway) -> None:
    broken: list[bool] = []

    def answer(asked: dict[str, Any]) -> Answer:
        if broken:
            return error(400)
        if asked["input"] == ["text 3"]:
            return error(400)
        if "text 20" in asked["input"]:
            broken.append(True)
        return error(400) if "text 3" in asked["input"] else good(asked)

    far.answer = answer
    with pytest.raises(GatewayRefused, match="400"):
        world.run()
    assert {index for index, _ in world.rejects()} <= {3}
    assert world.chunk["embedded"] + world.chunk["rejected"] < _ITEMS


def test_each_text_that_is_refused_is_judged_by_itself(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(422) if {"text 3", "text 30"} & set(asked["input"]) else good(asked)
    world.run()
    world.must_be_done(_ITEMS - 2)
    assert sorted(world.rejects()) == [(3, "gateway_refused"), (30, "gateway_refused")]
    assert [request["input"] for request in far.requests].count([CANARY]) == 3


def _other_weights(asked: dict[str, Any]) -> Answer:
    return good({**asked, "input": [text + "!" for text in asked["input"]]})


@pytest.mark.parametrize("meanwhile", ["time passes", "the breaker opens", "it is gone"])
def test_weights_that_change_between_two_claims(
    world: World, far: ScriptedGateway, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    world.run()
    other = make_job(world.engine, world.model, 4)
    far.requests.clear()
    world.run(taken(world.engine, other))
    assert [CANARY] not in [request["input"] for request in far.requests], "known, and so it isn't asked again"
    far.answer = _other_weights
    assert world.model.upstream
    match meanwhile:
        case "time passes":
            monkeypatch.setattr(remembering, "_PROOF_SECONDS", 0.0)
        case "the breaker opens":
            with connect(world.redis_url) as redis:
                throttle = Throttle(redis, world.model.upstream, "sk-one")
                for leave in [throttle.reserve(1, 1.0) for _ in range(5)]:
                    throttle.failed(leave, None)
        case "it is gone":
            gone = replace(world.model.upstream, url=f"http://127.0.0.1:{free_port()}/v1")
            with pytest.raises(GatewayBusy):
                world.run(
                    taken(world.engine, make_job(world.engine, world.model, 4)),
                    model=replace(world.model, upstream=gone),
                )
    before = count(world.engine, "embeddings")
    with pytest.raises(GatewayChanged, match="canary"):
        world.run(taken(world.engine, make_job(world.engine, world.model, 4)))
    assert count(world.engine, "embeddings") == before


def test_weights_that_are_mended(world: World, far: ScriptedGateway) -> None:
    far.answer = _other_weights
    with pytest.raises(GatewayChanged):
        world.run()
    far.answer = good
    run_sql(world.engine, "update vectormill.chunks set state = 'pending'")
    world.run()
    world.must_be_done()


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


def _an_error(status: int, *, endless: bool) -> Iterator[bytes]:
    head = f"HTTP/1.1 {status} No\r\nretry-after: 3000\r\ncontent-length: 1000000000000\r\n\r\n<html>"
    yield head.encode()
    while endless:
        yield b"<p>" * 10_000
    yield from hanging()


@pytest.mark.parametrize("endless", [True, False])
def test_an_error_counts_however_its_page_goes_on(world: World, far: ScriptedGateway, endless: bool) -> None:
    far.answer = lambda asked: _an_error(429, endless=endless)
    with pytest.raises(GatewayBusy, match="answers 429") as busy:
        world.run(seconds=2.0)
    assert busy.value.wait_seconds == pytest.approx(3_000, abs=5)
    took = run_sql(world.engine, "select max(finished_at - started_at) < '1.5 s' from vectormill.attempts")
    assert took == [(endless,)], "of a long page no more than a bit is read"


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


def test_a_gateway_that_says_no_usage(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(lambda body: body.pop("usage") and None)
    world.run()
    world.must_be_done()
    assert run_sql(world.engine, "select count(*), sum(billed_tokens) from vectormill.attempts") == [(6, 11)]
    with world.engine.begin() as connection:
        tokens = status.receipt(connection, world.job)["tokens"]
    assert tokens["billed"] == 11, "the canary's"
    assert tokens["unanswered"] == tokens["prompt"] > 0


def test_a_count_of_tokens_that_no_text_has(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(lambda body: body["usage"].update(prompt_tokens=2**40, total_tokens=2**40))
    world.run()
    world.must_be_done()
    assert run_sql(world.engine, "select max(tokens) < 100 from vectormill.embeddings") == [(True,)]


def test_an_attempt_whose_commit_was_not_heard_of_is_written_once(world: World) -> None:
    claim, attempt_id = taken(world.engine, world.job), store_attempts.new_id()
    for _ in range(2):
        with world.engine.begin() as connection:
            store_attempts.begin(connection, attempt_id, claim, "far", items=1, estimated_tokens=3)
    assert count(world.engine, "attempts") == 1


def test_a_database_that_is_away_is_no_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(hung_after_seconds=-1, most_seconds=60)  # hung at once, unless it rests
    hung: list[bool] = []
    begin = store_attempts.begin

    def slow(*arguments: Any, **more: Any) -> None:
        hung.append(watch.hung)
        begin(*arguments, **more)

    monkeypatch.setattr(store_attempts, "begin", slow)
    claim = taken(world.engine, world.job)
    attempts = Attempts(world.engine, claim, "far", watch)
    attempts.begin(1, 1)
    assert not watch.hung, "outside of a batch it goes on resting"
    watch.beat()
    attempts.begin(1, 1)
    assert hung == [False, False]
    assert watch.hung


@pytest.mark.parametrize("status", [400, 413])
def test_the_size_that_a_gateway_takes_is_remembered(world: World, far: ScriptedGateway, status: int) -> None:
    far.answer = lambda asked: error(status) if len(asked["input"]) > 3 else good(asked)
    world.run()
    world.must_be_done()
    first = len(far.requests)
    far.requests.clear()
    world.run(taken(world.engine, make_job(world.engine, world.model, _ITEMS, per_chunk=_ITEMS)))
    assert max(len(request["input"]) for request in far.requests) <= 3
    assert len(far.requests) < first


def test_a_text_that_is_refused_teaches_no_size(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(400) if "text 13" in asked["input"] else good(asked)
    world.run()
    assert world.memory.most_inputs == float("inf")


def test_a_request_of_more_than_a_minutes_tokens_is_split(world: World, far: ScriptedGateway) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        if len(asked["input"]) <= 4:
            return good(asked)
        status, headers, body = error(429, "rate_limit_exceeded", retry_after_ms="1")
        body["error"]["message"] = "Request too large for embed-1 on tokens per min (TPM): Limit 10, Requested 16."
        return status, headers, body

    far.answer = answer
    world.run()
    world.must_be_done()


def test_a_reply_that_is_too_long_is_not_read(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: (200, {}, b"[" * 50_000_000)
    with pytest.raises(GatewayRefused, match="longer than"):
        world.run()


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


def test_a_cancelled_chunk_keeps_what_was_paid_for(world: World, far: ScriptedGateway) -> None:
    watch = Watch(60, 60)

    def answer(asked: dict[str, Any]) -> Answer:
        watch.cancelled = asked["input"] != [CANARY]
        return good(asked)

    far.answer = answer
    world.run(watch=watch)
    sent = sum(len(request["input"]) for request in far.requests[1:])
    assert (world.chunk["state"], world.chunk["embedded"]) == ("cancelled", sent)
    assert 8 <= sent <= 24
