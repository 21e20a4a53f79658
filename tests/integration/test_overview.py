"""Queries of the dashboard's overview: what they count, and what they leave out."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine

from pipeline.api.dashboard import overview as page
from pipeline.api.dashboard.overview import TokensByHour
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.db import overview
from pipeline.ingest.collections import create_collection
from tests.support.jobs_made import make_job, make_model, run_sql

_AGE = 900.0


def stuck(engine: Engine, workspace: int | None = None) -> list[tuple[str, int, bool]]:
    with engine.begin() as connection:
        found = overview.stuck(connection, workspace, _AGE)
    return [(row["model"], row["jobs"], row["running"]) for row in found]


def failures(engine: Engine, limit: int = 5) -> overview.Failures:
    with engine.begin() as connection:
        return overview.failures_today(connection, None, limit)


def age(engine: Engine, job: UUID, **moments: str) -> None:
    """Set columns of a job to SQL expressions."""
    changes = ", ".join(f"{name} = {value}" for name, value in moments.items())
    run_sql(engine, f"update vectormill.jobs set {changes} where id = :job", job=job)


def committed(engine: Engine, job: UUID, ago: str) -> None:
    run_sql(
        engine,
        """
        insert into vectormill.usage
          (workspace_id, job_id, chunk_id, fence, part, model, total_tokens, created_at)
        select workspace_id, id, 1, 1, (select count(*) from vectormill.usage), model_name, 10,
               now() - cast(:ago as interval)
        from vectormill.jobs where id = :job
        """,
        job=job,
        ago=ago,
    )


def running(engine: Engine, model: Model, ago: str = "'1 hour'") -> UUID:
    job = make_job(engine, model)
    begun = f"now() - interval {ago}"
    age(engine, job, state="'running'", queued_at=begun, started_at=begun)
    return job


def test_a_model_is_stuck_when_none_of_its_jobs_moves(engine: Engine, model: Model) -> None:
    first, second = running(engine, model), running(engine, model)
    assert stuck(engine) == [(model.name, 2, True)]
    committed(engine, first, "20 minutes")
    assert stuck(engine) == [(model.name, 2, True)]
    committed(engine, second, "1 minute")
    assert stuck(engine) == []


def test_a_job_that_is_being_finished_is_not_stuck(engine: Engine, model: Model) -> None:
    job = running(engine, model)
    run_sql(engine, "update vectormill.chunks set state = 'done' where job_id = :job", job=job)
    assert stuck(engine) == []
    with engine.begin() as connection:
        assert overview.waiting(connection, None) == []


def test_queued_jobs_that_never_begin_are_stuck(engine: Engine, model: Model) -> None:
    job = make_job(engine, model)
    assert stuck(engine) == []
    age(engine, job, queued_at="now() - interval '20 minutes'")
    assert stuck(engine) == [(model.name, 1, False)]
    age(engine, job, resumed_at="now()")
    assert stuck(engine) == []
    age(engine, job, resumed_at="null")
    before = running(engine, model, "'1 minute'")
    assert stuck(engine) == []
    age(engine, before, state="'completed'", finished_at="now() - interval '1 minute'")
    assert stuck(engine) == [], "it has just had its workers"
    age(engine, before, finished_at="now() - interval '16 minutes'")
    assert stuck(engine) == [(model.name, 1, False)]


def test_many_jobs_of_one_model_hide_no_other(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_MOST_RUNNING", 2)
    for _ in range(4):
        running(engine, model, "'1 minute'")
    other = make_model(engine, "other")
    running(engine, other)
    assert stuck(engine) == [("other", 1, True)]


def failed(engine: Engine, model: Model, name: str, ago: str = "'1 minute'") -> UUID:
    job = make_job(engine, model, name=name)
    age(engine, job, state="'failed'", reason="'source_damaged'", finished_at=f"now() - interval {ago}")
    return job


def test_a_failure_that_nothing_made_good_comes_before_many_others(engine: Engine, model: Model) -> None:
    lasting = failed(engine, model, "lasting", "'3 hours'")
    failed(engine, model, "yesterday's", "'25 hours'")
    for _ in range(3):
        failed(engine, model, "mended")
    age(engine, make_job(engine, model, name="mended"), state="'completed'", finished_at="now()")
    found = failures(engine, 2)
    assert (found.failed, found.is_cut) == (4, False)
    assert [(row["id"] == lasting, row["mended"]) for row in found.jobs] == [(True, False), (False, True)]


def test_a_success_before_a_failure_makes_nothing_good(engine: Engine, model: Model) -> None:
    age(engine, make_job(engine, model, name="x"), state="'completed'", finished_at="now()")
    failed(engine, model, "x")
    assert [row["mended"] for row in failures(engine).jobs] == [False]


def test_what_is_not_looked_at_is_said(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "NEWEST_ENDED", 2)
    failed(engine, model, "one")
    assert not failures(engine).is_cut
    failed(engine, model, "two")
    failed(engine, model, "three")
    assert (failures(engine).failed, failures(engine).is_cut) == (2, True)


def test_rejects_of_the_day_are_those_of_jobs_that_run_and_that_ended(engine: Engine, model: Model) -> None:
    age(engine, make_job(engine, model), progress="""'{"items": {"rejected": 3}}'""")
    for ago in ("1 hour", "2 days"):
        age(
            engine,
            make_job(engine, model),
            state="'completed'",
            receipt="""'{"items": {"rejected": 40}}'""",
            finished_at=f"now() - interval '{ago}'",
        )
    assert failures(engine).rejected == 43


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000.0]
    monkeypatch.setattr(page, "monotonic", lambda: now[0])
    return now


def test_an_hour_that_is_over_is_summed_once_and_a_young_one_again(
    engine: Engine, model: Model, clock: list[float]
) -> None:
    job, cache = running(engine, model), TokensByHour()

    def read(how: Any = engine) -> list[int]:
        with how.begin() as connection:
            return [tokens for _, tokens in cache.of_last_day(connection, None)]

    assert sum(read()) == 0
    committed(engine, job, "5 hours")
    committed(engine, job, "0 seconds")
    assert sum(read()) == 0
    clock[0] += 61
    assert sum(read()) == 10, "late rows of a young hour are counted, old hours aren't read again"
    cache = TokensByHour()
    found = read()
    assert (len(found), found[-1], found[-6]) == (24, 10, 10)


def test_a_visit_that_takes_too_long_helps_the_next_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, read = TokensByHour(), list[datetime]()

    def slow(_connection: Any, _workspace: int | None, hour: datetime) -> int:
        if len(read) == 10 and read[-1] != hour:
            read.append(hour)
            raise TimeoutError
        read.append(hour)
        return 1

    monkeypatch.setattr(overview, "tokens_of_hour", slow)
    with engine.begin() as connection:
        with pytest.raises(TimeoutError):
            cache.of_last_day(connection, None)
        assert sum(tokens for _, tokens in cache.of_last_day(connection, None)) == 24
    assert len(read) == 25, "each hour once, but for the one that failed"


def test_the_last_sync_tells_how_stale_a_collection_is(engine: Engine, model: Model) -> None:
    with engine.begin() as connection:
        made = create_collection(
            connection, 1, "tickets", model=model.name, options=JobOptions(), expect_every=timedelta(hours=1)
        )
    run_sql(engine, "update vectormill.collections set created_at = now() - interval '3 hours'")

    def late() -> float | None:
        with engine.begin() as connection:
            (found,) = overview.freshness(connection, 1, 5)
        return found.stale_seconds

    assert late() == pytest.approx(7_200, abs=60)
    for at in ("90 minutes", "10 minutes", "2 hours"):
        job = make_job(engine, model)
        run_sql(
            engine,
            """
            insert into vectormill.syncs (job_id, collection_id, version_id, is_whole, last_slot, settled_at)
            values (:job, :collection, :version, true, 0, now() - cast(:at as interval))
            """,
            job=job,
            collection=made.id,
            version=made.version_id,
            at=at,
        )
    assert late() is None
