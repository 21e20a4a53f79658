"""The dispatcher's duties, on a real Postgres and a real Valkey."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid7

from pipeline import control, dispatch
from pipeline.dispatch import Dispatcher, drain, finish, judge_models, keep_house, publish, remove_old_texts, sweep
from pipeline.errands import ERRANDS, Means
from pipeline.errors import ServiceUnreachable, UserError
from pipeline.jobs import Model, RejectCode
from pipeline.publish import Publisher, queue_of
from pipeline.settings import Settings
from pipeline.store import items, losses, models, workers
from pipeline.writeback import write_chunk
from tests.jobs_made import (
    DONE,
    PENDING,
    RUNNING,
    chunk_ids,
    chunk_rows,
    count,
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


def test_a_lost_chunk_waits_for_no_lap(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 40)
    ids = chunk_ids(engine, job_id)
    publish(dispatcher)
    taken(engine, job_id, 0, lease_seconds=-1)
    with engine.begin() as connection:
        assert losses.expire_leases(connection, 10) == [ids[0]]
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], *ids[:4]], "the queue is full, and it comes before all that is in it"
    drop(valkey, 5)
    publish(dispatcher)
    assert waiting(valkey) == ids[4:8], "its message may be on its way, and it isn't rung for at once again"
    drop(valkey, 4)
    dispatcher.rounds.rung[ids[0]] -= 10
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
        dispatcher.rounds.rung.clear()
    assert len(waiting(valkey)) == 8


@pytest.mark.parametrize("patient", [True, False])
def test_a_chunk_lost_again(
    engine: Engine, model: Model, valkey: "redis.Redis", dispatcher: Dispatcher, patient: bool
) -> None:
    """One whose process died again waits its turn; one that has waited for a lease again doesn't."""
    job_id = make_job(engine, model, 40)
    ids = chunk_ids(engine, job_id)
    for loss in (die, lose) if patient else (lose, die):
        loss(engine, job_id, 0)
    publish(dispatcher)
    assert waiting(valkey) == [ids[0], *ids[:4]], "nothing else waited yet"
    drop(valkey, 2)
    dispatcher.rounds.rung[ids[0]] -= 10
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
    assert dispatcher.rounds.cursors == {}


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
    assert sorted(map(len, (first.rounds.cursors, second.rounds.cursors))) == [0, 1]
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


# Cancelling


@pytest.fixture
def drains_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a transaction, and one transaction a turn."""
    monkeypatch.setattr(dispatch, "_DRAIN_LIMIT", 2)
    ticks = itertools.count()
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(dispatch, "_LONGEST_DUTY_SECONDS", 1.5)


@pytest.mark.usefixtures("drains_two")
def test_a_drain_goes_on_in_the_next_turn(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 24)
    claim = taken(engine, job_id, 0)
    with engine.begin() as connection:
        control.cancel(connection, job_id)
    drained = []
    for turn in range(4):
        drain(dispatcher)
        drained.append([row["state"] for row in chunk_rows(engine, job_id)].count("cancelled"))
        if turn == 1:  # it comes back behind what has been drained
            write_chunk(engine, claim, 0, part_of([0]), PENDING)
        finish(dispatcher)
    assert drained == [2, 4, 5, 6]
    row = job_row(engine, job_id)
    assert (row["state"], row["receipt"]["items"]["embedded"], row["receipt"]["items"]["cancelled"]) == (
        "cancelled",
        1,
        23,
    )


# Models that don't work


def state(engine: Engine, job_id: UUID) -> tuple[Any, Any]:
    row = job_row(engine, job_id)
    return row["state"], row["reason"]


def lose(engine: Engine, job_id: UUID, ordinal: int) -> None:
    """A worker claims a chunk and is never heard of again."""
    taken(engine, job_id, ordinal, lease_seconds=-1)
    with engine.begin() as connection:
        assert losses.expire_leases(connection, 10)


def die(engine: Engine, job_id: UUID, ordinal: int) -> None:
    """A worker's child claims a chunk and dies over it."""
    claim = taken(engine, job_id, ordinal, task=f"of {ordinal}")
    with engine.begin() as connection:
        assert losses.free_lost_claim(connection, claim.chunk_id, claim.worker_id, f"of {ordinal}", "killed")


def test_jobs_whose_claims_are_mostly_lost_are_paused(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    sound = make_job(engine, make_model(engine, "sound"), 40)
    job_id = make_job(engine, model, 40)
    write_chunk(engine, taken(engine, job_id, 9), 0, part_of([36, 37, 38, 39]), DONE)
    for ordinal in (0, 1):
        die(engine, job_id, ordinal)
        judge_models(dispatcher)
        assert state(engine, job_id) == ("running", None)
    die(engine, job_id, 2)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("paused", "workers_failing")
    assert "3 claims lost and 1 commits" in job_row(engine, job_id)["message"]
    assert state(engine, sound) == ("queued", None)


def test_a_person_who_resumes_has_mended_the_workers(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 40)
    for ordinal in range(3):
        die(engine, job_id, ordinal)
    judge_models(dispatcher)
    with engine.begin() as connection:
        control.resume(connection, job_id)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("queued", None)


def test_a_machine_that_goes_with_all_its_claims_pauses_nobody(
    engine: Engine, model: Model, dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 40)
    for ordinal in range(10):
        lose(engine, job_id, ordinal)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("running", None)
    for ordinal in range(3):
        lose(engine, job_id, ordinal)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("paused", "workers_failing"), "but when the next ones lose the same chunks again"


def test_claims_that_committed_before_they_were_lost_pause_nobody(
    engine: Engine, model: Model, dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 40)
    for ordinal in range(4):
        claim = taken(engine, job_id, ordinal, task="died")
        write_chunk(engine, claim, 0, part_of([4 * ordinal]), RUNNING)
        with engine.begin() as connection:
            assert losses.free_lost_claim(connection, claim.chunk_id, claim.worker_id, "died", "killed")
    judge_models(dispatcher)
    assert state(engine, job_id) == ("running", None)


def test_a_text_that_kills_its_process_pauses_nobody(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 40)
    for _ in range(5):
        lose(engine, job_id, 0)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("running", None)


def test_work_that_is_mostly_done_goes_on(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 40)
    for ordinal in range(3):
        die(engine, job_id, ordinal)
        first = 4 * ordinal
        write_chunk(engine, taken(engine, job_id, ordinal), 0, part_of(range(first, first + 4)), DONE)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("running", None)


def test_jobs_of_a_model_that_nobody_can_load_fail(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id, other = make_job(engine, model), make_job(engine, make_model(engine, "sound"))
    here, there = show_worker(engine, "small", 1), show_worker(engine, "small", 1)
    drop_model(engine, here)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("queued", None), "there it is served still"
    drop_model(engine, there)
    judge_models(dispatcher)
    assert state(engine, job_id) == ("cancelling", "model_cannot_load")
    assert job_row(engine, job_id)["message"] == "its canary came out wrong"
    drain(dispatcher)
    finish(dispatcher)
    assert state(engine, job_id) == ("failed", "model_cannot_load")
    assert state(engine, other) == ("queued", None)


def test_jobs_of_a_model_that_nobody_can_load_any_more_pause(
    engine: Engine, model: Model, dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id)
    drop_model(engine, show_worker(engine, "small", 1))
    judge_models(dispatcher)
    assert state(engine, job_id) == ("paused", "workers_failing")
    assert job_row(engine, job_id)["message"] == "its canary came out wrong"


def test_a_model_that_is_added_anew_is_served_again(engine: Engine, model: Model) -> None:
    worker = show_worker(engine, "small", 1)
    drop_model(engine, worker)
    with engine.begin() as connection:
        models.remove(connection, model.name)
    make_model(engine)
    with engine.begin() as connection:
        assert workers.dropped_by(connection, worker) == {}


def drop_model(engine: Engine, worker: UUID) -> None:
    with engine.begin() as connection:
        workers.drop_model(connection, worker, "small", "its canary came out wrong")
    run_sql(engine, "update vectormill.workers set models = '{}' where id = :id", id=worker)


def test_jobs_of_a_removed_model_fail(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id, other = make_job(engine, model), make_job(engine, make_model(engine, "sound"))
    with engine.begin() as connection:
        assert models.remove(connection, model.name)
    judge_models(dispatcher)
    drain(dispatcher)
    finish(dispatcher)
    assert state(engine, job_id) == ("failed", "model_cannot_load")
    assert "no longer in the catalogue" in job_row(engine, job_id)["message"]
    assert state(engine, other) == ("queued", None)


# The sweep, and what is forgotten


def test_after_a_gap_in_the_database_the_sweep_waits_for_one_lease(
    engine: Engine, model: Model, dispatcher: Dispatcher
) -> None:
    dispatcher.lease_seconds = 0.1
    job_id = make_job(engine, model)
    taken(engine, job_id, lease_seconds=-1)
    gap_began = dispatcher.last_contact = time.monotonic() - 60
    sweep(dispatcher)
    assert chunk_rows(engine, job_id)[0]["state"] == "running"
    assert dispatcher.last_contact > gap_began + 60
    assert 0 < dispatcher.sweep_from - dispatcher.last_contact <= 0.2
    dispatcher.sweep_from = time.monotonic()
    sweep(dispatcher)
    assert chunk_rows(engine, job_id)[0]["state"] == "pending"


def stage(engine: Engine, job_id: UUID, dead_for_seconds: float) -> UUID:
    """A submission whose producer died after it had written two items."""
    made = make_job(
        engine, make_model(engine, f"model-{job_id}"), 2, job_id=job_id, rejected={1: RejectCode.EMPTY_TEXT}
    )
    died = """
        update vectormill.jobs set state = 'staging', lease_until = now() - make_interval(secs => :age) where id = :job
    """
    run_sql(engine, died, age=dead_for_seconds, job=made)
    return made


def test_submissions_that_nobody_came_back_for_are_forgotten(engine: Engine, model: Model) -> None:
    dead, lately = stage(engine, uuid7(), 86_400 + 60), stage(engine, uuid7(), 86_400 - 60)
    job_id = make_job(engine, model)
    (errand,) = [errand for errand in ERRANDS if errand.name == "forget_staging"]
    with engine.connect() as connection:
        due = errand.due(connection, 10)
    for piece in due:
        errand.do(Means(engine, Settings()), piece)
    for table in ("items", "rejects", "chunks"):
        found = run_sql(engine, f"select distinct job_id from vectormill.{table}")
        assert dead not in {row for (row,) in found}
    assert {row for (row,) in run_sql(engine, "select id from vectormill.jobs")} == {lately, job_id}
    assert count(engine, "items") == 2 + 8


def test_workers_that_are_long_gone_are_forgotten(engine: Engine, dispatcher: Dispatcher) -> None:
    gone, quiet = show_worker(engine, "small", 1), show_worker(engine, "small", 1)
    for worker, age in ((gone, 3_601), (quiet, 3_000)):
        seen = "update vectormill.workers set seen_at = now() - make_interval(secs => :age) where id = :id"
        run_sql(engine, seen, age=age, id=worker)
    keep_house(dispatcher)
    assert run_sql(engine, "select id from vectormill.workers") == [(quiet,)]


def test_old_texts_go_range_by_range(
    engine: Engine, model: Model, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_REMOVE_LIMIT", 3)
    old, older, young = (make_job(engine, model) for _ in range(3))
    for job_id, days in ((old, 8), (older, 9), (young, 6)):
        ended = """
            update vectormill.jobs set state = 'completed', finished_at = now() - make_interval(days => :days)
            where id = :job
        """
        run_sql(engine, ended, job=job_id, days=days)
    removed: list[tuple[UUID, int, int]] = []
    remove = items.remove_texts

    def note(connection: Connection, job_id: UUID, first: int, limit: int) -> None:
        removed.append((job_id, first, limit))
        remove(connection, job_id, first, limit)
        with pytest.raises(UserError, match="its texts were removed"):
            control.retry(connection, job_id)

    monkeypatch.setattr(items, "remove_texts", note)
    remove_old_texts(dispatcher)
    assert removed == [(job_id, first, 3) for job_id in (older, old) for first in (0, 3, 6)]
    kept = "select job_id, count(*), count(text), count(key) from vectormill.items group by job_id"
    assert {row[0]: row[1:] for row in run_sql(engine, kept)} == {
        old: (8, 0, 8),
        older: (8, 0, 8),
        young: (8, 8, 8),
    }
    remove_old_texts(dispatcher)
    assert len(removed) == 6
