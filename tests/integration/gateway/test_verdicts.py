"""Rejects by an upstream: a text that fails alone while the canary passes. Requests that are too large are split."""

import base64
from typing import Any

import numpy as np
import pytest

from pipeline.core.canary import CANARY
from pipeline.core.errors import GatewayRefused
from tests.integration.gateway.world import ITEMS, World
from tests.support.jobs_made import count, make_job, run_sql, taken
from tests.support.scripted_gateway import DIMENSIONS, Answer, ScriptedGateway, error, good, hanging
from workers.upstream import encoder as client
from workers.watchdog import Watch


def test_one_text_that_is_refused_is_rejected_alone(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(400) if "text 13" in asked["input"] else good(asked)
    world.run()
    world.must_be_done(ITEMS - 1)
    assert world.rejects() == [(13, "gateway_refused")]
    (message,) = run_sql(world.engine, "select message from vectormill.rejects")
    assert message == ("the upstream answers 400 some_error",), "nothing of what it quotes"


def test_one_text_that_breaks_the_gateway_is_rejected_alone(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(500) if "text 13" in asked["input"] else good(asked)
    world.run()
    world.must_be_done(ITEMS - 1)
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
    world.must_be_done(ITEMS - 3)
    assert sorted(world.rejects()) == [(7, "bad_vector"), (8, "bad_vector"), (30, "bad_vector")]
    assert [request["input"] for request in far.requests].count([CANARY]) == 1 + 3 * 2, "asked twice for each"


def test_vectors_that_are_bad_for_a_while_convict_nobody(world: World, far: ScriptedGateway) -> None:
    """The canary passes while whole requests fail."""
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


def test_a_text_on_which_the_gateway_hangs_is_rejected_alone(
    world: World, far: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.5)
    far.answer = lambda asked: hanging() if "text 13" in asked["input"] else good(asked)
    world.run(seconds=2.0)
    world.must_be_done(ITEMS - 1)
    assert world.rejects() == [(13, "gateway_failed")]


@pytest.mark.parametrize("status", [502, 503, 504, None], ids=str)
def test_a_text_for_which_the_gateway_goes_away_is_rejected_alone(
    world: World, far: ScriptedGateway, status: int | None
) -> None:
    def answer(asked: dict[str, Any]) -> Answer | None:
        if "text 0" not in asked["input"]:
            return good(asked)
        return error(status) if status else None

    world.run()  # so that the canary is known
    far.answer = answer
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert world.rejects() == [(0, "gateway_failed")], "though nothing else came through"


def test_a_text_that_fails_for_a_while_is_embedded(world: World, far: ScriptedGateway) -> None:
    fails = iter([True] * 4)
    far.answer = lambda asked: error(503) if asked["input"] == ["text 0"] and next(fails, False) else good(asked)
    world.run(taken(world.engine, make_job(world.engine, world.model, 1)))
    assert world.rejects() == []
    assert count(world.engine, "embeddings") == 1


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
    assert world.chunk["embedded"] + world.chunk["rejected"] < ITEMS


def test_each_text_that_is_refused_is_judged_by_itself(world: World, far: ScriptedGateway) -> None:
    far.answer = lambda asked: error(422) if {"text 3", "text 30"} & set(asked["input"]) else good(asked)
    world.run()
    world.must_be_done(ITEMS - 2)
    assert sorted(world.rejects()) == [(3, "gateway_refused"), (30, "gateway_refused")]
    assert [request["input"] for request in far.requests].count([CANARY]) == 3


@pytest.mark.parametrize("status", [400, 413])
def test_the_size_that_a_gateway_takes_is_remembered(world: World, far: ScriptedGateway, status: int) -> None:
    far.answer = lambda asked: error(status) if len(asked["input"]) > 3 else good(asked)
    world.run()
    world.must_be_done()
    first = len(far.requests)
    far.requests.clear()
    world.run(taken(world.engine, make_job(world.engine, world.model, ITEMS, per_chunk=ITEMS)))
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
