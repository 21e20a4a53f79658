"""Judgement of models that don't work: their jobs are paused, failed or left alone."""

from typing import Any
from uuid import UUID

from sqlalchemy import Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.models import Model
from pipeline.db import lost_claims, models, workers
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.maintenance import drain, judge_models
from pipeline.dispatch.state import Dispatcher
from pipeline.jobs import control
from tests.integration.dispatching import die, lose, show_worker
from tests.support.jobs_made import DONE, RUNNING, job_row, make_job, make_model, part_of, run_sql, taken


def state(engine: Engine, job_id: UUID) -> tuple[Any, Any]:
    row = job_row(engine, job_id)
    return row["state"], row["reason"]


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
            assert lost_claims.free_lost_claim(connection, claim.chunk_id, claim.worker_id, "died", "killed")
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
