"""Control of jobs: transitions, ends, verification by the receipt, retry and the sweep."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine

from pipeline.broker import Publisher
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import IllegalTransition, UnknownJob, UserError
from pipeline.core.jobs import JOB_TRANSITIONS, JobState
from pipeline.core.models import Model
from pipeline.db import jobs
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.maintenance import drain, remove_old_texts, snapshot, sweep
from pipeline.dispatch.state import Dispatcher
from pipeline.jobs import control
from pipeline.jobs.verification import verified_receipt
from tests.support.jobs_made import (
    DONE,
    RUNNING,
    chunk_rows,
    job_row,
    make_job,
    part_of,
    reject,
    run_sql,
    take,
    taken,
    unfinished,
)

Ask = Callable[[Connection, UUID], object]


@pytest.fixture
def dispatcher(engine: Engine, redis_url: str) -> Iterator[Dispatcher]:
    publisher = Publisher(redis_url)
    yield Dispatcher(engine=engine, publisher=publisher, lease_seconds=0.1, text_retention_days=7)
    publisher.close()


def ask(engine: Engine, what: Ask, job_id: UUID) -> Any:
    with engine.begin() as connection:
        return what(connection, job_id)


def set_state(engine: Engine, job_id: UUID, state: str) -> None:
    run_sql(engine, "update vectormill.jobs set state = :state where id = :job", state=state, job=job_id)


def state(engine: Engine, job_id: UUID) -> tuple[Any, Any]:
    row = job_row(engine, job_id)
    return row["state"], row["reason"]


def states(engine: Engine, job_id: UUID) -> list[str]:
    return [row["state"] for row in chunk_rows(engine, job_id)]


def embed(engine: Engine, job_id: UUID, ordinal: int, bad: dict[int, RejectCode] | None = None) -> None:
    """Claim a chunk and end it, with rejects for some of its items."""
    claim, bad = taken(engine, job_id, ordinal), bad or {}
    indexes = [item.index for item in unfinished(engine, claim)]
    rejects = [reject(index, bad[index]) for index in indexes if index in bad]
    write_chunk(engine, claim, 0, part_of([index for index in indexes if index not in bad], rejects), DONE)


def account(engine: Engine, job_id: UUID) -> Any:
    with engine.begin() as connection:
        return verified_receipt(connection, job_id).model_dump(by_alias=True)


def counted(engine: Engine, job_id: UUID) -> tuple[Any, ...]:
    items = account(engine, job_id)["items"]
    return tuple(items[name] for name in ("in", "embedded", "reused", "rejected", "cancelled"))


# Transitions


@pytest.mark.parametrize(
    ("what", "becomes", "legal_from", "unchanged_in"),
    [
        (control.cancel, "cancelling", {"queued", "running", "paused"}, {"cancelling", "cancelled"}),
        (control.pause, "paused", {"queued", "running"}, {"paused"}),
        (control.resume, "queued", {"paused"}, {"queued", "running"}),
    ],
    ids=["cancel", "pause", "resume"],
)
def test_transitions(
    engine: Engine, model: Model, what: Ask, becomes: str, legal_from: set[str], unchanged_in: set[str]
) -> None:
    job_id = make_job(engine, model)
    for before in JobState:
        set_state(engine, job_id, before)
        if before in legal_from | unchanged_in:
            wanted = becomes if before in legal_from else before
            assert ask(engine, what, job_id) == wanted == job_row(engine, job_id)["state"]
        else:
            with pytest.raises(IllegalTransition, match=f"is {before} and can't be"):
                ask(engine, what, job_id)


def test_a_job_that_hasnt_ended_gets_another_priority(engine: Engine, model: Model) -> None:
    job_id, other = make_job(engine, model), make_job(engine, model)
    for before in JobState:
        set_state(engine, job_id, before)
        run_sql(engine, "update vectormill.jobs set priority = 0")
        if before.ended:
            with pytest.raises(IllegalTransition, match=f"is {before} and can't be given another priority"):
                ask(engine, to_seven, job_id)
            assert job_row(engine, job_id)["priority"] == 0
        else:
            ask(engine, to_seven, job_id)
            row = job_row(engine, job_id)
            assert (row["priority"], row["state"], job_row(engine, other)["priority"]) == (7, before, 0)


def to_seven(connection: Connection, job_id: UUID) -> None:
    control.prioritise(connection, job_id, 7)


@pytest.mark.parametrize("what", [control.cancel, control.pause, control.resume, control.retry, to_seven])
def test_a_job_that_isnt_there(engine: Engine, what: Ask) -> None:
    with pytest.raises(UnknownJob):
        ask(engine, what, UUID(int=7))


def test_only_completed_and_failed_jobs_are_retried(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    for before in set(JobState) - {JobState.COMPLETED, JobState.FAILED}:
        set_state(engine, job_id, before)
        with pytest.raises(IllegalTransition):
            ask(engine, control.retry, job_id)


def test_the_store_refuses_what_the_table_doesnt_allow(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    for before, to in product(JobState, JobState):
        set_state(engine, job_id, before)
        with engine.begin() as connection:
            assert jobs.move(connection, job_id, to) is (to in JOB_TRANSITIONS[before])


def test_a_paused_job_rests_and_goes_on(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id)
    ask(engine, control.pause, job_id)
    assert state(engine, job_id) == ("paused", "by_user")
    assert take(engine, job_id, 1) is None
    write_chunk(engine, claim, 0, part_of([0, 1, 2, 3]), DONE)
    ask(engine, control.resume, job_id)
    assert state(engine, job_id) == ("queued", None)
    assert take(engine, job_id, 1)


# Ends


def test_a_job_completes(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model)
    embed(engine, job_id, 0)
    finish(dispatcher)
    assert state(engine, job_id) == ("running", None)
    embed(engine, job_id, 1)
    finish(dispatcher)
    row = job_row(engine, job_id)
    assert (row["state"], row["receipt"]["balanced"], row["progress"]["state"]) == ("completed", True, "completed")
    found = account(engine, job_id)
    assert found["items"] == {
        "in": 8,
        "embedded": 8,
        "reused": 0,
        "unchanged": 0,
        "rejected": 0,
        "cancelled": 0,
        "removed": 0,
        "forgotten": 0,
    }
    assert found["tokens"]["prompt"] == found["tokens"]["billed"] == 24
    assert (found["verified"], found["missing"], found["double"]) == (True, 0, 0)


def test_a_receipt_lists_what_embedded_the_items(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model, 14, per_chunk=4)
    for ordinal, by in enumerate([("cpu", "float32"), ("NVIDIA H200", "bfloat16"), ("NVIDIA H200", "bfloat16"), ()]):
        claim = taken(engine, job_id, ordinal)
        indexes = [item.index for item in unfinished(engine, claim)]
        device, precision = by or (None, None)  # as a worker of a version before commits
        write_chunk(engine, claim, 0, replace(part_of(indexes), device=device, precision=precision), DONE)
    found = account(engine, job_id)
    assert found["embedded_on"] == [
        {"device": "NVIDIA H200", "precision": "bfloat16", "items": 8, "tokens": 24},
        {"device": "cpu", "precision": "float32", "items": 4, "tokens": 12},
    ]
    assert (found["items"]["embedded"], found["verified"]) == (14, True)


def test_a_receipt_is_frozen_at_the_end(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0)
    finish(dispatcher)
    before = account(engine, job_id)
    run_sql(engine, "update vectormill.chunks set prompt_tokens = 99")
    assert account(engine, job_id) == {**before, "verified": False}, "and it objects to chunks that changed since"


def test_a_job_with_all_items_rejected_fails(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4, rejected=dict.fromkeys(range(4), RejectCode.EMPTY_TEXT), max_rejects=0)
    snapshot(dispatcher)  # whichever duty comes first
    finish(dispatcher)
    assert state(engine, job_id) == ("failed", "all_rejected")
    assert counted(engine, job_id) == (4, 0, 0, 4, 0)


def test_too_many_rejects_end_a_job_early(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 12, max_rejects=1)
    embed(engine, job_id, 0, {0: RejectCode.TOO_LONG})
    snapshot(dispatcher)
    assert state(engine, job_id) == ("running", None)
    embed(engine, job_id, 1, {4: RejectCode.TOO_LONG})
    snapshot(dispatcher)
    assert state(engine, job_id) == ("cancelling", "too_many_rejects")
    drain(dispatcher)
    finish(dispatcher)
    row = job_row(engine, job_id)
    assert (row["state"], row["reason"]) == ("failed", "too_many_rejects")
    assert "2 items rejected, 1 allowed" in row["message"]
    assert counted(engine, job_id) == (12, 6, 0, 2, 4)
    assert account(engine, job_id)["verified"]


def test_too_many_rejects_at_the_end(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4, max_rejects=0)
    embed(engine, job_id, 0, {1: RejectCode.TOO_LONG})
    finish(dispatcher)
    assert state(engine, job_id) == ("failed", "too_many_rejects")


def test_a_cancelled_job_counts_what_it_left(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 16, rejected={9: RejectCode.EMPTY_TEXT})
    embed(engine, job_id, 0)
    claim = taken(engine, job_id, 1)
    ask(engine, control.cancel, job_id)
    drain(dispatcher)
    assert states(engine, job_id) == ["done", "running", "cancelled", "cancelled"]
    finish(dispatcher)
    assert state(engine, job_id) == ("cancelling", "by_user")
    write_chunk(engine, claim, 0, part_of([4, 5, 6, 7]), DONE)
    finish(dispatcher)
    assert state(engine, job_id) == ("cancelled", "by_user")
    assert counted(engine, job_id) == (16, 8, 0, 1, 7)
    assert account(engine, job_id)["verified"]


def test_a_chunk_that_was_half_done_is_cancelled_for_the_rest(
    engine: Engine, model: Model, dispatcher: Dispatcher
) -> None:
    job_id = make_job(engine, model, 4)
    write_chunk(engine, taken(engine, job_id, lease_seconds=-1), 0, part_of([0], [reject(1)]), RUNNING)
    run_sql(engine, "update vectormill.chunks set state = 'pending'")
    ask(engine, control.cancel, job_id)
    drain(dispatcher)
    finish(dispatcher)
    assert counted(engine, job_id) == (4, 1, 0, 1, 2)
    assert account(engine, job_id)["verified"]


# Verification


def test_a_missing_vector_is_found(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0)
    finish(dispatcher)
    run_sql(engine, "delete from vectormill.embeddings where index = 2")
    found = account(engine, job_id)
    assert (found["balanced"], found["verified"], found["missing"], found["double"]) == (True, False, 1, 0)


def test_a_reject_beside_a_vector_is_found(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0)
    finish(dispatcher)
    run_sql(engine, "insert into vectormill.rejects values (:job, 2, 'k2', 'too_long', '')", job=job_id)
    found = account(engine, job_id)
    assert (found["verified"], found["missing"], found["double"]) == (False, 0, 1)


def test_a_vector_without_an_item_is_found(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0)
    finish(dispatcher)
    run_sql(engine, "delete from vectormill.items where index = 2")
    found = account(engine, job_id)
    assert (found["verified"], found["missing"], found["double"]) == (False, 0, 1)


# Retry


def test_retry_reopens_only_what_may_succeed(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 12, rejected={11: RejectCode.EMPTY_TEXT})
    embed(engine, job_id, 0, {1: RejectCode.BAD_VECTOR, 2: RejectCode.TOO_LONG})
    embed(engine, job_id, 1, {5: RejectCode.TOO_LONG})
    embed(engine, job_id, 2, {8: RejectCode.CRASHED_WORKER})
    finish(dispatcher)
    assert counted(engine, job_id) == (12, 7, 0, 5, 0)
    assert ask(engine, control.retry, job_id) == 2
    row = job_row(engine, job_id)
    assert (row["state"], row["receipt"], row["finished_at"]) == ("queued", None, None)
    assert states(engine, job_id) == ["pending", "done", "pending"]
    assert [item.index for item in unfinished(engine, taken(engine, job_id, 2))] == [8]
    set_back(engine)
    embed(engine, job_id, 0)
    embed(engine, job_id, 2)
    finish(dispatcher)
    assert counted(engine, job_id) == (12, 9, 0, 3, 0)
    assert account(engine, job_id)["verified"]


def set_back(engine: Engine) -> None:
    run_sql(engine, "update vectormill.chunks set state = 'pending' where state = 'running'")


def test_retry_of_a_failed_job_reopens_what_was_cancelled(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 12, max_rejects=0)
    embed(engine, job_id, 0, {1: RejectCode.ENCODE_FAILED})
    snapshot(dispatcher)
    drain(dispatcher)
    finish(dispatcher)
    assert counted(engine, job_id) == (12, 3, 0, 1, 8)
    assert ask(engine, control.retry, job_id) == 3
    for ordinal in range(3):
        embed(engine, job_id, ordinal)
    finish(dispatcher)
    assert state(engine, job_id) == ("completed", None)
    assert counted(engine, job_id) == (12, 12, 0, 0, 0)
    assert account(engine, job_id)["verified"]


def test_retry_without_anything_to_try_changes_nothing(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0, {1: RejectCode.TOO_LONG})
    finish(dispatcher)
    before = job_row(engine, job_id)
    assert ask(engine, control.retry, job_id) == 0
    assert job_row(engine, job_id) == before


def test_a_job_whose_texts_are_gone_isnt_retried(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model, 4)
    embed(engine, job_id, 0, {1: RejectCode.BAD_VECTOR})
    finish(dispatcher)
    run_sql(engine, "update vectormill.jobs set finished_at = now() - interval '8 days'")
    remove_old_texts(dispatcher)
    assert run_sql(engine, "select distinct text from vectormill.items") == [(None,)]
    with pytest.raises(UserError, match="its texts were removed"):
        ask(engine, control.retry, job_id)


# The sweep


def test_the_sweep_gives_expired_chunks_back(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id, lease_seconds=-1)
    sweep(dispatcher)
    assert states(engine, job_id) == ["pending", "pending"]


def test_the_sweep_waits_after_a_gap(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id, lease_seconds=-1)
    dispatcher.sweep_from = time.monotonic() + 60
    sweep(dispatcher)
    assert states(engine, job_id) == ["running", "pending"]


def test_the_sweep_waits_while_the_server_is_young(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id, lease_seconds=-1)
    dispatcher.lease_seconds = 86_400
    sweep(dispatcher)
    assert states(engine, job_id) == ["running", "pending"]
