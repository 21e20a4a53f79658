"""Maintenance: the sweep, and the removal of old stagings, workers and texts."""

import time
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid7

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import UserError
from pipeline.core.models import Model
from pipeline.db import items
from pipeline.dispatch import maintenance
from pipeline.dispatch.background import TASKS, Resources
from pipeline.dispatch.maintenance import maintain, remove_old_texts, sweep
from pipeline.dispatch.state import Dispatcher
from pipeline.infra.settings import Settings
from pipeline.jobs import control
from tests.integration.dispatching import show_worker
from tests.support.jobs_made import chunk_rows, count, make_job, make_model, run_sql, taken


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
    """Make a submission whose producer died after it had written two items."""
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
    (task,) = [task for task in TASKS if task.name == "forget_staging"]
    with engine.connect() as connection:
        due = task.due(connection, 10)
    for piece in due:
        task.do(Resources(engine, Settings()), piece)
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
    maintain(dispatcher)
    assert run_sql(engine, "select id from vectormill.workers") == [(quiet,)]


def test_old_texts_go_range_by_range(
    engine: Engine, model: Model, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "_REMOVE_LIMIT", 3)
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
