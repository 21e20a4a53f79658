"""Checks of an upstream's replies before anything is written: vectors of the right texts, by the right model."""

import base64
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from pipeline.core.canary import CANARY
from pipeline.core.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.jobs import status
from tests.integration.gateway.world import ITEMS, World, upstream_of
from tests.support.jobs_made import count, make_job, run_sql, taken
from tests.support.ports import free_port
from tests.support.scripted_gateway import DIMENSIONS, Answer, ScriptedGateway, error, good
from workers.upstream import state as remembering
from workers.upstream.probe import describe
from workers.upstream.rate_limiter import RateLimiter, connect


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
    # The upstream's own counts: two words per text, eleven for the canary.
    usage = run_sql(world.engine, "select prompt_tokens, device, precision from vectormill.usage")
    assert usage == [(2 * ITEMS, None, None)]
    assert run_sql(world.engine, "select sum(billed_tokens) from vectormill.attempts") == [(2 * ITEMS + 11,)]
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
    assert describe(upstream_of(far))["base64"] is False


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
    # The canary's reply alone is good, so the texts are to blame.
    far.answer = _with(_set(embedding=[0.5] * (DIMENSIONS - 1)))
    assert world.model.upstream
    world.run(model=replace(world.model, upstream=replace(world.model.upstream, request_inputs=4)))
    assert count(world.engine, "embeddings") == 0
    assert {code for _, code in world.rejects()} == {"gateway_failed"}
    assert world.statuses() == {"ok", "200"}


def test_no_reply_brings_vectors_of_the_wrong_texts(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(_set(index=0))  # right for single texts only, so in the end each goes out alone
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
                limiter = RateLimiter(redis, world.model.upstream, "sk-one")
                for leave in [limiter.reserve(1, 1.0) for _ in range(5)]:
                    limiter.failed(leave, None)
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


def test_a_gateway_that_says_no_usage(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(lambda body: body.pop("usage") and None)
    world.run()
    world.must_be_done()
    assert run_sql(world.engine, "select count(*), sum(billed_tokens) from vectormill.attempts") == [(6, 11)]
    with world.engine.begin() as connection:
        tokens = status.receipt(connection, world.job).tokens
    assert tokens.billed == 11, "the canary's"
    assert tokens.unanswered == tokens.prompt > 0


def test_a_count_of_tokens_that_no_text_has(world: World, far: ScriptedGateway) -> None:
    far.answer = _with(lambda body: body["usage"].update(prompt_tokens=2**40, total_tokens=2**40))
    world.run()
    world.must_be_done()
    assert run_sql(world.engine, "select max(tokens) < 100 from vectormill.embeddings") == [(True,)]


def test_a_reply_that_is_too_long_is_not_read(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: (200, {}, b"[" * 50_000_000)
    with pytest.raises(GatewayRefused, match="longer than"):
        world.run()
