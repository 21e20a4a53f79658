"""Check of a restored database, and repairs on request."""

from pathlib import Path

import pytest
from sqlalchemy import Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.models import Model
from pipeline.db.database import make_engine
from pipeline.jobs import control
from pipeline.jobs.restore import Matter, check
from tests.integration.tickets import Tickets, rows_of
from tests.support.jobs_made import DONE, RUNNING, chunk_rows, job_row, make_job, part_of, run_sql, taken


def matters(engine: Engine, name: str) -> list[Matter]:
    return [matter for matter in check(engine) if matter.name == name]


def mended(engine: Engine, name: str) -> str:
    """Run the only repair of this name and return its message. Nothing must be left to repair."""
    (mend,) = [matter.mend for matter in matters(engine, name) if matter.mend]
    did = mend()
    assert not any(matter.mend for matter in check(engine))
    return did


def test_a_database_that_needs_nothing(engine: Engine, model: Model) -> None:
    make_job(engine, model)
    assert not any(matter.mend for matter in check(engine))


def test_sequences_that_would_give_an_id_twice(engine: Engine, model: Model) -> None:
    """A restore of tables without their sequences leaves the database like this."""
    job = make_job(engine, model)
    run_sql(engine, "select setval(pg_get_serial_sequence('vectormill.chunks', 'id'), 1)")
    assert "chunks.id" in matters(engine, "sequences")[0].found
    assert mended(engine, "sequences") == "1 sequences moved on"
    make_job(engine, model)
    assert len(chunk_rows(engine, job)) == 2


def test_slots_of_keys_that_would_be_given_twice(tickets: Tickets) -> None:
    tickets.sync(rows_of(20))
    run_sql(tickets.engine, "select setval('vectormill.collection_slots', 3)")
    assert "collection_keys.slot" in matters(tickets.engine, "sequences")[0].found
    assert mended(tickets.engine, "sequences") == "1 sequences moved on"
    tickets.sync(rows_of(25))
    tickets.shows(rows_of(25))


def test_claims_of_before_are_given_back_and_blame_nobody(engine: Engine, model: Model) -> None:
    job = make_job(engine, model)
    taken(engine, job, 0, lease_seconds=-1)
    alive = taken(engine, job, 1)
    assert mended(engine, "claims") == "1 chunks given back"
    rows = chunk_rows(engine, job)
    assert [(row["state"], row["crashes"]) for row in rows] == [("pending", 0), ("running", 0)]
    assert taken(engine, job, 0).fence == 2
    assert rows[1]["token"] == alive.token


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def with_output(engine: Engine, model: Model, folder: Path) -> None:
    """Make a job with a Parquet output: one chunk with two parts, and one that is pending."""
    options = {"output": str(folder), "columns": {"carry": []}, "dtype": "float32"}
    job = make_job(engine, model, options=options)
    claim = taken(engine, job)
    write_chunk(engine, claim, 0, part_of([0, 1]), RUNNING)
    write_chunk(engine, claim, 1, part_of([2, 3]), DONE)


def test_chunks_whose_parts_are_gone_are_embedded_again(engine: Engine, model: Model, folder: Path) -> None:
    with_output(engine, model, folder)
    ((job,),) = run_sql(engine, "select id from vectormill.jobs")
    first, second = sorted(folder.rglob("part-*.parquet"), key=lambda file: file.name.count("-"))
    first.unlink()
    assert mended(engine, "parts") == f"1 chunks of job {job} reopened"
    row = chunk_rows(engine, job)[0]
    assert (row["state"], row["embedded"], row["prompt_tokens"]) == ("pending", 2, 6)
    again = taken(engine, job)
    assert again.fence > 2
    write_chunk(engine, again, 0, part_of([0, 1]), DONE)
    assert chunk_rows(engine, job)[0]["embedded"] == 4
    assert second.exists()


def test_a_folder_that_is_not_seen_from_here_costs_nothing(engine: Engine, model: Model, folder: Path) -> None:
    """The check may run on another machine than the workers."""
    with_output(engine, model, folder)
    folder.rename(folder.with_name("elsewhere"))
    (matter,) = matters(engine, "parts")
    assert (matter.mend, "none is seen from here" in matter.advice) == (None, True)


def test_an_ended_jobs_missing_parts_are_told_and_left(engine: Engine, model: Model, folder: Path) -> None:
    with_output(engine, model, folder)
    ((job,),) = run_sql(engine, "select id from vectormill.jobs")
    run_sql(engine, "update vectormill.jobs set state = 'completed'")
    for file in folder.rglob("part-*.parquet"):
        file.unlink()
    (matter,) = matters(engine, "parts")
    assert (matter.mend, "2 of its parts are missing" in matter.found) == (None, True)
    assert "submit it again" in matter.advice
    assert job_row(engine, job)["state"] == "completed"


def test_jobs_that_go_on_are_named(engine: Engine, model: Model) -> None:
    job = make_job(engine, model, name="nightly")
    (matter,) = matters(engine, "jobs")
    assert f'{job} ("nightly") is queued and goes on' in matter.found
    with engine.begin() as connection:
        control.cancel(connection, job)
    run_sql(engine, "update vectormill.jobs set state = 'cancelled'")
    assert matters(engine, "jobs")[0].found == "no job is open"


def test_a_url_may_name_several_hosts(database: str) -> None:
    """One host isn't there; the other takes writes."""
    login, _, place = database.partition("@")
    several = f"{login}@127.0.0.1:1,{place}?target_session_attrs=read-write"
    made = make_engine(several, application="vectormill-tests")
    try:
        assert run_sql(made, "select pg_is_in_recovery()") == [(False,)]
    finally:
        made.dispose()
