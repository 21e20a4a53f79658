"""History of a job, as its page tells it: who submitted it, by which query, and what became of it."""

import os
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine

from pipeline.api.dashboard import history
from pipeline.core.jobs import Reason
from pipeline.core.models import Model
from pipeline.db import jobs, sql_requests
from pipeline.jobs import control
from tests.support.commands import run_command
from tests.support.jobs_made import make_job, run_sql


def told(engine: Engine, job: UUID) -> list[str]:
    with engine.begin() as connection:
        row = jobs.by_id(connection, job)
        assert row is not None
        return [event.told for event in history.of_job(connection, row)]


def change(engine: Engine, job: UUID, how: Any, *arguments: Any) -> None:
    with engine.begin() as connection:
        how(connection, job, *arguments)


def test_every_change_of_state_and_priority_is_told_in_order(engine: Engine, model: Model) -> None:
    job = make_job(engine, model, 8)
    change(engine, job, control.prioritise, 7)
    change(engine, job, control.prioritise, 7)
    change(engine, job, control.pause)
    change(engine, job, control.pause)
    change(engine, job, control.resume)
    change(engine, job, control.pause_for, Reason.STORAGE_REFUSED, "the bucket is gone")
    change(engine, job, control.resume)
    change(engine, job, control.cancel)
    run_sql(engine, "update vectormill.jobs set notices = notices, progress = '{}' where id = :job", job=job)
    assert told(engine, job) == [
        "Submitted",
        "Queued",
        "Priority 7, before 0",
        "Paused: by a person",
        "Resumed",
        "Paused: the storage refuses access, or is full",
        "Resumed",
        "Cancelling: by a person",
    ]


def test_lost_claims_are_counted_by_minute(engine: Engine, model: Model) -> None:
    job = make_job(engine, model, 8)
    run_sql(
        engine,
        "insert into vectormill.claim_losses (model, job_id, chunk_id, fence, cause, lost_at) "
        "select :model, :job, n, 1, 'WorkerLostError', date_trunc('minute', now()) + make_interval(mins => n / 3) "
        "from generate_series(3, 8) n",
        model=model.name,
        job=job,
    )
    assert told(engine, job)[-2:] == ["3 claims lost", "3 claims lost"]


def test_a_reason_of_a_version_before_is_told_as_it_stands(engine: Engine, model: Model) -> None:
    job = make_job(engine, model, 8)
    run_sql(engine, "update vectormill.jobs set state = 'paused', reason = 'moon_phase' where id = :job", job=job)
    assert told(engine, job)[-1] == "Paused: moon_phase"


def test_of_a_long_history_the_beginning_and_the_end_are_told(engine: Engine, model: Model) -> None:
    job = make_job(engine, model, 8)
    for priority in range(1, 100):
        run_sql(engine, "update vectormill.jobs set priority = :priority where id = :job", job=job, priority=priority)
    events = told(engine, job)
    assert (events[0], events[1], events[-1]) == ("Submitted", "41 changes before this one", "Priority 99, before 98")


@pytest.mark.parametrize("rows", [1, 0])
def test_who_submitted_a_job_by_which_query(
    engine: Engine, model: Model, database: str, redis_url: str, rows: int
) -> None:
    query = f"select 1 as id, 'a mill' as text from generate_series(1, {rows})"
    environment = {**os.environ, "VECTORMILL_DATABASE_URL": database, "VECTORMILL_REDIS_URL": redis_url}
    arguments = ["--from", database, "--query", query, "--model", model.name]
    done = run_command("submit", *arguments, "--allow-empty", environment=environment)
    assert done.returncode == 0, done.stderr
    found = run_sql(engine, "select submitted_by, query from vectormill.job_history where submitted_by is not null")
    assert [row[1] for row in found] == [query] * rows
    if rows:
        assert "@" in found[0][0]
        change(engine, UUID(done.stdout.strip()), lambda connection, _: sql_requests.forget_queries(connection, 7))
        run_sql(engine, "update vectormill.jobs set state = 'completed', finished_at = now() - interval '8 days'")
        assert run_sql(engine, "select count(*) from vectormill.job_history where query is not null") == [(1,)]
        change(engine, UUID(done.stdout.strip()), lambda connection, _: sql_requests.forget_queries(connection, 7))
        assert run_sql(engine, "select count(*) from vectormill.job_history where query is not null") == [(0,)]
