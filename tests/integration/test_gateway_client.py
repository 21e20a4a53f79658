"""Chunks through gateways of all kinds, on real Postgres and Redis, over real connections."""

import base64
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from pipeline.catalog import add_gateway, find_model, workspace_id
from pipeline.errors import GatewayBusy, GatewayRefused, ModelError
from pipeline.jobs import Claim, Model, Upstream
from tests.jobs_made import chunk_rows, count, make_job, run_sql, taken
from tests.ports import free_port
from tests.scripted_gateway import DIMENSIONS, Answer, ScriptedGateway, error, good, scripted_gateway, vector_of
from workers import gateway as client
from workers.canary import CANARY
from workers.gateway import Attempts, Connection, GatewayEncoder, describe
from workers.run_chunk import Watch, run_chunk
from workers.throttle import Throttle, connect

_ITEMS = 40


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_REST_SECONDS", 0.005)
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
        self.proven: set[str] = set()
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
        attempts, watch = Attempts(self.engine, claim, model.name), watch or Watch(60, 60)
        with Connection(model.upstream, seconds=seconds, in_flight=3) as connection, connect(self.redis_url) as redis:
            throttle = Throttle(redis, model.upstream)
            encoder = GatewayEncoder(model, connection, throttle, attempts, in_flight=3, proven=self.proven)
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
    with pytest.raises(ModelError, match="canary"):
        world.run()
    assert count(world.engine, "embeddings") == 0


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


def test_vectors_that_are_not_finite_are_rejected(world: World, far: ScriptedGateway) -> None:
    nan = base64.b64encode(np.full(DIMENSIONS, np.nan, "<f4").tobytes()).decode()
    far.answer = _with(_set(embedding=nan))
    world.run()
    assert world.chunk["embedded"] == _ITEMS - 5
    assert {code for _, code in world.rejects()} == {"bad_vector"}
    assert sorted(index for index, _ in world.rejects()) == [7, 15, 23, 31, 39]


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


def test_a_body_that_trickles_is_given_up(world: World, far: ScriptedGateway) -> None:
    slow = iter([True])

    def answer(asked: dict[str, Any]) -> Answer:
        # A length that never comes: the connection stays open.
        return (200, {"content-length": "100"}, b"{") if next(slow, False) else good(asked)

    far.answer = answer
    world.run(seconds=1.0)
    world.must_be_done()
    assert run_sql(world.engine, "select count(*) from vectormill.attempts where billed_tokens is null") == [(1,)]


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
