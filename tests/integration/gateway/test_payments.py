"""Paid work of an upstream: its vectors are committed, and each attempt is recorded once, before it is made."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.core.canary import CANARY
from pipeline.core.chunks import Claim
from pipeline.db import attempts as store_attempts
from tests.integration.gateway.world import ITEMS, World
from tests.support.jobs_made import count, run_sql, taken
from tests.support.scripted_gateway import Answer, ScriptedGateway, good
from workers.upstream.attempts import Attempts
from workers.watchdog import Watch


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
    assert sum(items for _, items in parts) == ITEMS
    assert len(parts) >= 3
    assert run_sql(world.engine, "select sum(prompt_tokens) from vectormill.usage") == [(2 * ITEMS,)]


def _cancelled(world: World) -> Claim:
    """Claim a chunk, then set its job to cancelling."""
    claim = taken(world.engine, world.job)
    run_sql(world.engine, "update vectormill.jobs set state = 'cancelling' where id = :job", job=world.job)
    return claim


def test_a_cancelled_chunk_awaits_what_is_under_way_between_commits(world: World, far: ScriptedGateway) -> None:
    claim = _cancelled(world)
    watch = Watch(60, 60, commit_seconds=0)
    all_are_out = threading.Event()

    def held(asked: dict[str, Any]) -> Iterator[bytes]:
        all_are_out.wait(120)
        body = json.dumps(good(asked)[2]).encode()
        yield b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)

    def answer(asked: dict[str, Any]) -> Answer | Iterator[bytes]:
        if len(far.requests) == 4:  # the canary's request and three more
            watch.cancelled = True
            all_are_out.set()
        return good(asked) if asked["input"] == [CANARY] else held(asked)

    far.answer = answer
    world.run(claim, watch=watch)
    assert (world.chunk["state"], world.chunk["embedded"]) == ("cancelled", 24)


def test_an_attempt_whose_commit_was_not_heard_of_is_written_once(world: World) -> None:
    claim, attempt_id = taken(world.engine, world.job), store_attempts.new_id()
    for _ in range(2):
        with world.engine.begin() as connection:
            store_attempts.begin(connection, attempt_id, claim, "far", items=1, estimated_tokens=3)
    assert count(world.engine, "attempts") == 1


def test_a_database_that_is_away_is_no_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(hung_after_seconds=-1, most_seconds=60)  # hung at once, unless the watch rests
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


def test_a_cancelled_chunk_keeps_what_was_paid_for(world: World, far: ScriptedGateway) -> None:
    claim = _cancelled(world)
    watch = Watch(60, 60)

    def answer(asked: dict[str, Any]) -> Answer:
        watch.cancelled = asked["input"] != [CANARY]
        return good(asked)

    far.answer = answer
    world.run(claim, watch=watch)
    sent = sum(len(request["input"]) for request in far.requests[1:])
    assert (world.chunk["state"], world.chunk["embedded"]) == ("cancelled", sent)
    assert 8 <= sent <= 24
