"""Purge of jobs and months: rows deleted, rows kept, and requests refused."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.cli import main
from pipeline.core.errors import IllegalTransition, UnknownJob, UserError
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.db import items, jobs, partitions, rejects, staging, workspaces
from pipeline.db.outputs import Output
from pipeline.db.outputs import record as record_output
from pipeline.jobs import control, purge
from tests.support.jobs_made import DONE, count, job_row, make_job, part_of, reject, run_sql, taken

OLD, OLDER = datetime(2025, 3, 1, tzinfo=UTC), datetime(2025, 2, 1, tzinfo=UTC)
#: Tables whose rows go with a job. Usage stays.
TABLES = ("jobs", "chunks", "inputs", "outputs", "items", "embeddings", "passages", "rejects")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    database: str,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a function that runs a command and returns its exit code, output and error output."""
    for name, value in (("DATABASE_URL", database), ("REDIS_URL", redis_url), ("HOME", str(tmp_path))):
        monkeypatch.setenv(f"VECTORMILL_{name}", value)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vectormill", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return run


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every loop go round more than once."""
    monkeypatch.setattr(purge, "_ROWS", 2)
    monkeypatch.setattr(purge, "_JOBS", 2)


def made(engine: Engine, model: Model, state: str = "completed", **how: Any) -> UUID:
    """Make a job in `state` with an input and two chunks, each with a reject and an output part."""
    job_id = make_job(engine, model, **how)
    for ordinal in (0, 1):
        claim = taken(engine, job_id, ordinal)
        first = 4 * ordinal
        write_chunk(engine, claim, 0, part_of(range(first, first + 3), [reject(first + 3)]), DONE)
        with engine.begin() as connection:
            part = Output(chunk_id=claim.chunk_id, fence=1, part=0, name="part", rows=3, bytes=9)
            record_output(connection, claim, part)
    with engine.begin() as connection:
        staging.insert_inputs(connection, job_id, [{"uri": "docs.jsonl", "etag": "", "bytes": 1}])
    run_sql(engine, "update vectormill.jobs set state = :state where id = :job", state=state, job=job_id)
    return job_id


def made_in(engine: Engine, model: Model, month: datetime, number: int, state: str = "completed", **how: Any) -> UUID:
    """Make such a job in an earlier month, with the partitions of that month."""
    job_id = UUID(int=partitions.lowest_id(month).int + number)
    with engine.begin() as connection:
        partitions.make_month(connection, month)
    return made(engine, model, state, job_id=job_id, **how)


def left(engine: Engine) -> dict[str, int]:
    return {table: count(engine, table) for table in TABLES}


def months(engine: Engine) -> list[datetime]:
    with engine.begin() as connection:
        return partitions.months(connection)


# One job


@pytest.mark.usefixtures("small_steps")
def test_a_job_goes_and_others_stay(engine: Engine, model: Model) -> None:
    made(engine, model)
    before, usage = left(engine), count(engine, "usage")
    gone = purge.purge_job(engine, made(engine, model))
    assert gone == {"items": 8, "embeddings": 6, "passages": 0, "rejects": 2, "chunks": 2}
    assert left(engine) == before
    assert count(engine, "usage") == 2 * usage, "what was metered is the bill"


def test_a_job_that_hasnt_ended_is_refused(engine: Engine, model: Model) -> None:
    job_id = made(engine, model)
    before = left(engine)
    for state in JobState:
        if not state.ended:
            run_sql(engine, "update vectormill.jobs set state = :state", state=state)
            with pytest.raises(IllegalTransition, match=f"is {state} and can't be purged; cancel it first"):
                purge.purge_job(engine, job_id)
    assert left(engine) == before
    assert job_row(engine, job_id)["texts_removed_at"] is None
    with pytest.raises(UnknownJob):
        purge.purge_job(engine, UUID(int=7))


class Cut(Exception):
    """Simulated end of the process."""


def test_what_was_cut_off_isnt_retried_and_is_purged_again(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = made(engine, model)
    delete = items.delete_range

    def cut(connection: Connection, table: str, *rest: Any) -> int:
        if table == "rejects":
            raise Cut
        return delete(connection, table, *rest)

    monkeypatch.setattr(items, "delete_range", cut)
    with pytest.raises(Cut):
        purge.purge_job(engine, job_id)
    monkeypatch.undo()
    assert (count(engine, "items"), count(engine, "rejects")) == (0, 2)
    with pytest.raises(UserError, match="its texts were removed"), engine.begin() as connection:
        control.retry(connection, job_id)
    assert purge.purge_job(engine, job_id) == {"items": 0, "embeddings": 0, "passages": 0, "rejects": 2, "chunks": 2}
    assert set(left(engine).values()) == {0}


# Months


@pytest.mark.usefixtures("small_steps")
def test_a_month_goes_with_the_jobs_of_all_workspaces(engine: Engine, model: Model) -> None:
    with engine.begin() as connection:
        other = workspaces.create(connection, "other", 1.0)
    made(engine, model)
    before, usual = left(engine), months(engine)
    for number in range(5):
        made_in(engine, model, OLD, number, workspace=other if number % 2 else None)
    assert purge.purge_month(engine, OLD) is None
    assert left(engine) == before
    assert months(engine) == usual
    assert count(engine, "usage") == 12


def test_a_month_with_a_job_that_hasnt_ended_stays_whole(engine: Engine, model: Model) -> None:
    made_in(engine, model, OLD, 1)
    made_in(engine, model, OLD, 2, "paused")
    before = left(engine)
    assert purge.purge_month(engine, OLD) == "1 of its jobs haven't ended"
    assert left(engine) == before
    assert OLD in months(engine)


def test_the_current_month_is_never_among_them(engine: Engine, model: Model) -> None:
    made(engine, model)
    made_in(engine, model, OLD, 1)
    with engine.begin() as connection:
        found = purge.months_before(connection, datetime(9000, 1, 1, tzinfo=UTC))
        assert [(month.first, month.jobs, month.unended) for month in found] == [(OLD, 1, 0)]
        assert purge.months_before(connection, OLD) == []


def test_a_month_in_use_stays_and_goes_later(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge, "_LOCK_SECONDS", 0.05)
    made_in(engine, model, OLD, 1)
    with engine.begin() as connection:
        rejects.page(connection, UUID(int=partitions.lowest_id(OLD).int + 1), -1, 10)
        why = purge.purge_month(engine, OLD)
    assert why == "rejects is in use by other sessions; purge the month again later"
    assert OLD in months(engine)
    assert purge.purge_month(engine, OLD) is None
    assert OLD not in months(engine)
    assert set(left(engine).values()) == {0}


def test_a_job_that_is_let_go_on_meanwhile_keeps_its_month(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in(engine, model, OLD, 1)
    kept = made_in(engine, model, OLD, 2)
    give_up = jobs.give_up

    def late(connection: Connection, job_id: UUID) -> bool:
        if job_id == kept:
            with engine.begin() as other:
                control.retry(other, kept)
        return give_up(connection, job_id)

    monkeypatch.setattr(jobs, "give_up", late)
    assert purge.purge_month(engine, OLD) == "1 of its jobs haven't ended"
    assert job_row(engine, kept)["state"] == "queued"
    assert run_sql(engine, "select count(*) from vectormill.items where job_id = :job", job=kept) == [(8,)]
    assert [row for (row,) in run_sql(engine, "select distinct job_id from vectormill.chunks")] == [kept]


# The command


def test_the_command_for_a_job(engine: Engine, model: Model, run: Run) -> None:
    job_id = made(engine, model, name="docs")
    before = left(engine)
    wanted = {"jobs": 1, "items": 8, "embeddings": 6, "passages": 0, "rejects": 2, "chunks": 2}
    code, out, err = run("purge", "docs", "--dry-run", "--json")
    assert (code, json.loads(out), err) == (
        0,
        {"dry_run": True, **wanted},
        f"Would delete: job {job_id} (docs, 8 items).\n",
    )
    assert left(engine) == before
    code, out, err = run("purge", "docs")
    assert (code, out) == (2, "")
    assert err == f"error Delete job {job_id} (docs, 8 items)? There is no terminal to ask; confirm it with --yes.\n"
    assert left(engine) == before
    code, out, err = run("purge", "docs", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"dry_run": False, **wanted})
    assert err == f"Deleted: job {job_id} (docs, 8 items). Its usage rows stay.\n"
    assert run("purge", "docs", "--yes")[0] == 2


def test_the_command_refuses_a_running_job(engine: Engine, model: Model, run: Run) -> None:
    job_id = made(engine, model, "running", name="docs")
    code, _, err = run("purge", "docs", "--yes")
    assert (code, err) == (2, f"error job {job_id} is running and can't be purged; cancel it first.\n")


def test_the_command_for_months(engine: Engine, model: Model, run: Run) -> None:
    made(engine, model)
    made_in(engine, model, OLDER, 1, "queued")
    made_in(engine, model, OLD, 1)
    made_in(engine, model, OLD, 2)
    stays = {"2025-02": "1 of its jobs haven't ended"}
    code, out, err = run("purge", "--before", "2025-04", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"dry_run": True, "jobs": 2, "months": ["2025-03"], "skipped": stays})
    assert err == "Would delete: 2 jobs of 2025-03.\n2025-02 stays: 1 of its jobs haven't ended.\n"
    assert run("purge", "--before", "2025-04")[0] == 2
    assert OLD in months(engine)
    code, out, err = run("purge", "--before", "2999-01", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"dry_run": False, "jobs": 2, "months": ["2025-03"], "skipped": stays})
    assert (OLDER in months(engine), OLD in months(engine)) == (True, False)
    assert count(engine, "jobs") == 2
    assert run("purge", "--before", "2025-04", "--yes")[2].startswith("Nothing to purge.")


@pytest.mark.parametrize(
    "arguments", [(), ("docs", "--before", "2025-04"), ("--before", "soon"), ("--before", "2025-13")]
)
def test_what_the_command_doesnt_understand(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run("purge", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
