"""Ringing for chunks, by a real Valkey."""

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Engine

from pipeline import dispatch
from pipeline.dispatch import Dispatcher, publish
from pipeline.errors import ServiceUnreachable
from pipeline.jobs import Model
from pipeline.publish import Publisher, queue_of
from pipeline.store import workers
from tests.jobs_made import chunk_ids, chunk_rows, make_job, make_model, run_sql, taken

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def valkey(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def dispatcher(engine: Engine, redis_url: str) -> Iterator[Dispatcher]:
    with_publisher = made(engine, redis_url)
    yield with_publisher
    with_publisher.publisher.close()


def made(engine: Engine, redis_url: str) -> Dispatcher:
    return Dispatcher(engine=engine, publisher=Publisher(redis_url), lease_seconds=30, text_retention_days=7)


def waiting(valkey: "redis.Redis", slug: str = "small") -> list[int]:
    """Chunk ids in a model's queue, the next one first."""
    found = [json.loads(message) for message in valkey.lrange(queue_of(slug), 0, -1)]
    return [int(message["headers"]["argsrepr"].split("chunk=")[1].rstrip(")")) for message in reversed(found)]


def drop(valkey: "redis.Redis", messages: int, slug: str = "small") -> None:
    """A worker takes messages, and does nothing about them."""
    for _ in range(messages):
        assert valkey.rpop(queue_of(slug))


def show_worker(engine: Engine, model: str, slots: int) -> UUID:
    worker = uuid4()
    with engine.begin() as connection:
        workers.show(connection, worker, host="here", device="cpu", models=[model], slots=slots)
    return worker


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
    assert dispatcher.cursors == {}


def test_workspaces_share_a_queue(engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher) -> None:
    [(other,)] = run_sql(engine, "insert into vectormill.workspaces (name) values ('other') returning id")
    ids = chunk_ids(engine, make_job(engine, model, 40))
    others = chunk_ids(engine, make_job(engine, model, 40, workspace=other))
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], others[0], ids[1], others[1]]


def test_a_lost_valkey_is_no_error_of_a_duty(engine: Engine, model: Model) -> None:
    make_job(engine, model)
    away = made(engine, NOWHERE)
    with pytest.raises(ServiceUnreachable):
        publish(away)
    assert dispatch._attempt(partial(publish, away), otherwise="away") == "away"
    away.publisher.close()


def test_one_failing_job_keeps_no_duty_from_others(engine: Engine, model: Model) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert dispatch._attempt(fail, otherwise=3) == 3


def test_a_dispatcher_does_its_duties_and_a_second_one_waits(
    engine: Engine, model: Model, valkey: "redis.Redis", redis_url: str
) -> None:
    job_id = make_job(engine, model, 40)
    first, second, stop = made(engine, redis_url), made(engine, redis_url), threading.Event()
    runs = [threading.Thread(target=dispatch.run, args=(each, stop)) for each in (first, second)]
    for thread in runs:
        thread.start()
    try:
        deadline = time.monotonic() + 10
        while not waiting(valkey) and time.monotonic() < deadline:
            stop.wait(0.02)
    finally:
        stop.set()
        for thread in runs:
            thread.join()
    assert len(set(waiting(valkey))) == len(waiting(valkey)) == 4
    assert sorted(map(len, (first.cursors, second.cursors))) == [0, 1]
    assert run_sql(engine, "select count(*) from vectormill.leases") == [(0,)]
    assert {row["state"] for row in chunk_rows(engine, job_id)} == {"pending"}
    for each in (first, second):
        each.publisher.close()
