"""Dispatcher's duties on a real Postgres and a real Valkey."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import redis
from sqlalchemy import Engine

from pipeline.broker import queue_of
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.errors import ServiceUnreachable
from pipeline.core.models import Model
from pipeline.db import lost_claims
from pipeline.dispatch import dispatcher as dispatch
from pipeline.dispatch import maintenance
from pipeline.dispatch.dispatcher import finish, publish
from pipeline.dispatch.maintenance import drain
from pipeline.dispatch.state import Dispatcher
from pipeline.jobs import control
from tests.integration.dispatching import die, lose, make_dispatcher, show_worker
from tests.support.jobs_made import (
    RUNNING,
    chunk_ids,
    chunk_rows,
    job_row,
    make_job,
    make_model,
    part_of,
    run_sql,
    taken,
)

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def valkey(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def waiting(valkey: "redis.Redis", slug: str = "small") -> list[int]:
    """Return the chunk ids in a model's queue, the next one first."""
    found = [json.loads(message) for message in valkey.lrange(queue_of(slug), 0, -1)]
    return [int(message["headers"]["argsrepr"].split("chunk=")[1].rstrip(")")) for message in reversed(found)]


def drop(valkey: "redis.Redis", messages: int, slug: str = "small") -> None:
    """Take messages off a queue as a worker does, and drop them."""
    for _ in range(messages):
        assert valkey.rpop(queue_of(slug))


def test_a_queue_holds_four_without_workers(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    ids = chunk_ids(engine, make_job(engine, model, 40))
    for _ in range(3):
        publish(dispatcher)
        assert waiting(valkey) == ids[:4]


def test_a_message_names_job_and_chunk_and_no_text(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 4)
    publish(dispatcher)
    message = valkey.lindex(queue_of("small"), 0)
    assert isinstance(message, bytes)
    assert str(job_id).encode() in message
    assert b"text 0" not in message


def test_a_queue_holds_one_message_a_slot(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    ids = chunk_ids(engine, make_job(engine, model, 40))
    show_worker(engine, "small", 4)
    gone = show_worker(engine, "small", 3)
    publish(dispatcher)
    assert waiting(valkey) == ids[:7]
    run_sql(engine, "update vectormill.workers set seen_at = now() - interval '1 hour' where id = :id", id=gone)
    publish(dispatcher)
    assert waiting(valkey) == ids[:7]
    drop(valkey, 5)
    publish(dispatcher)
    assert waiting(valkey) == [*ids[5:7], *ids[7:9]]


def test_each_model_has_its_queue(engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher) -> None:
    other = make_model(engine, "Other/Model")
    ids, others = (chunk_ids(engine, make_job(engine, each, 8)) for each in (model, other))
    publish(dispatcher)
    assert waiting(valkey)[:2] == ids
    assert waiting(valkey, "other-model")[:2] == others


def test_a_flushed_valkey_is_refilled_at_once(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    ids = chunk_ids(engine, make_job(engine, model, 40))
    publish(dispatcher)
    valkey.flushall()
    publish(dispatcher)
    assert waiting(valkey) == ids[4:8]


def test_the_cursor_goes_round(engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher) -> None:
    ids = chunk_ids(engine, make_job(engine, model, 24))
    assert len(ids) == 6
    publish(dispatcher)
    drop(valkey, 4)
    publish(dispatcher)
    assert waiting(valkey) == [*ids[4:], *ids[:2]]


def test_a_lost_chunk_waits_for_no_lap(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 40)
    ids = chunk_ids(engine, job_id)
    publish(dispatcher)
    taken(engine, job_id, 0, lease_seconds=-1)
    with engine.begin() as connection:
        assert lost_claims.expire_leases(connection, 10) == [ids[0]]
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], *ids[:4]], "the queue is full, and it comes before all that is in it"
    drop(valkey, 5)
    publish(dispatcher)
    assert waiting(valkey) == ids[4:8], "its message may be on its way, and no other is published at once"
    drop(valkey, 4)
    dispatcher.scheduler.published[ids[0]] -= 10
    publish(dispatcher)
    assert waiting(valkey)[0] == ids[0], "but again in a while"


def test_a_queue_that_nobody_serves_stays_short(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 40)
    for ordinal in range(6):
        lose(engine, job_id, ordinal)
    for _ in range(5):
        publish(dispatcher)
        dispatcher.scheduler.published.clear()
    assert len(waiting(valkey)) == 8


@pytest.mark.parametrize("patient", [True, False])
def test_a_chunk_lost_again(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher, patient: bool
) -> None:
    """A chunk lost again to a dead process waits its turn. One lost to an expired lease has waited, and goes first."""
    job_id = make_job(engine, model, 40)
    ids = chunk_ids(engine, job_id)
    for loss in (die, lose) if patient else (lose, die):
        loss(engine, job_id, 0)
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], *ids[:4]], "nothing else waited yet"
    drop(valkey, 2)
    dispatcher.scheduler.published[ids[0]] -= 10
    publish(dispatcher)
    assert waiting(valkey) == (ids[:5] if patient else [*ids[1:4], ids[0], ids[4]])


def test_only_pending_chunks_whose_time_has_come_are_rung_for(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 16)
    ids = chunk_ids(engine, job_id)
    taken(engine, job_id, 1)
    later = "update vectormill.chunks set not_before = now() + interval '1 hour' where id = :id"
    run_sql(engine, later, id=ids[2])
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], ids[3]]


@pytest.mark.parametrize("state", ["staging", "paused", "cancelling", "completed"])
def test_jobs_that_dont_run_are_not_rung_for(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher, state: str
) -> None:
    make_job(engine, model)
    run_sql(engine, "update vectormill.jobs set state = :state", state=state)
    publish(dispatcher)
    assert waiting(valkey) == []
    assert dispatcher.scheduler.cursors == {}


def test_workspaces_share_a_queue(engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher) -> None:
    [(other,)] = run_sql(engine, "insert into vectormill.workspaces (name) values ('other') returning id")
    ids = chunk_ids(engine, make_job(engine, model, 40))
    others = chunk_ids(engine, make_job(engine, model, 40, workspace=other))
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], others[0], ids[1], others[1]]


def test_a_lost_valkey_is_no_error_of_a_duty(engine: Engine, model: Model) -> None:
    make_job(engine, model)
    away = make_dispatcher(engine, NOWHERE)
    with pytest.raises(ServiceUnreachable):
        publish(away)
    assert dispatch._attempt("publish", partial(publish, away), otherwise="away") == "away"
    away.publisher.close()


def test_one_failing_job_keeps_no_duty_from_others(engine: Engine, model: Model) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert dispatch._attempt("finish", fail, otherwise=3) == 3


def test_a_dispatcher_does_its_duties_and_a_second_one_waits(
    engine: Engine, model: Model, valkey: "redis.Redis", redis_url: str
) -> None:
    job_id = make_job(engine, model, 40)
    first, second, stop = make_dispatcher(engine, redis_url), make_dispatcher(engine, redis_url), threading.Event()
    runs = [threading.Thread(target=dispatch.run, args=(each, stop)) for each in (first, second)]
    for thread in runs:
        thread.start()
    try:
        deadline = time.monotonic() + 120
        while not waiting(valkey) and time.monotonic() < deadline:
            stop.wait(0.02)
    finally:
        stop.set()
        for thread in runs:
            thread.join()
    assert len(set(waiting(valkey))) == len(waiting(valkey)) == 4
    assert sorted(map(len, (first.scheduler.cursors, second.scheduler.cursors))) == [0, 1]
    assert run_sql(engine, "select count(*) from vectormill.leases") == [(0,)]
    assert {row["state"] for row in chunk_rows(engine, job_id)} == {"pending"}
    for each in (first, second):
        each.publisher.close()


def test_another_priority_counts_from_the_next_message(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    make_job(engine, model, 40)
    urgent = make_job(engine, model, 40)
    publish(dispatcher)
    drop(valkey, 4)
    with engine.begin() as connection:
        control.prioritise(connection, urgent, 1)
    publish(dispatcher)
    assert set(waiting(valkey)) <= set(chunk_ids(engine, urgent))


@pytest.fixture
def drains_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit drains to two chunks per transaction and one transaction per turn."""
    monkeypatch.setattr(maintenance, "_DRAIN_LIMIT", 2)
    ticks = itertools.count()
    monkeypatch.setattr(maintenance, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(maintenance, "_LONGEST_DUTY_SECONDS", 1.5)


@pytest.mark.usefixtures("drains_two")
def test_a_drain_goes_on_in_the_next_turn(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 24)
    write_chunk(engine, taken(engine, job_id, 0, lease_seconds=-1), 0, part_of([0]), RUNNING)
    with engine.begin() as connection:
        control.cancel(connection, job_id)
    drained = []
    for turn in range(4):
        drain(dispatcher)
        drained.append([row["state"] for row in chunk_rows(engine, job_id)].count("cancelled"))
        if turn == 1:  # the lost chunk comes back behind those already drained
            with engine.begin() as connection:
                assert lost_claims.expire_leases(connection, 1)
        finish(dispatcher)
    assert drained == [2, 4, 5, 6]
    row = job_row(engine, job_id)
    assert (row["state"], row["receipt"]["items"]["embedded"], row["receipt"]["items"]["cancelled"]) == (
        "cancelled",
        1,
        23,
    )
