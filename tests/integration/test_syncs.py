"""Syncs on a real Postgres, with a real model: they embed what changed, and remove what the source lacks."""

import gzip
import json
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv
from sqlalchemy import Connection

from pipeline.core.collections import OnDuplicateKey
from pipeline.core.errors import CollectionBusy, NotRetriable, SourceError
from pipeline.core.jobs import JobState, Reason
from pipeline.db import jobs, staging, syncs
from pipeline.dispatch import completion, finalize
from pipeline.jobs import collections, control
from pipeline.jobs.collections import find_collection
from pipeline.sources import Corpus
from tests.integration.tickets import Row, Tickets, drain_job, rows_of
from tests.support.jobs_made import chunk_rows, run_sql


@pytest.fixture(params=["by value", "by reference"])
def tickets(tickets: Tickets, request: pytest.FixtureRequest) -> Tickets:
    """Return the collection, whose syncs are by value or by reference."""
    tickets.by_reference = request.param == "by reference"
    return tickets


def test_only_what_changed_is_embedded(tickets: Tickets) -> None:
    rows = rows_of(120)
    assert tickets.sync(rows) == {"in": 120, "embedded": 120}
    tickets.shows(rows)
    assert tickets.sync(rows) == {"in": 120, "unchanged": 120}
    changed = [{**rows[0], "text": "another mill"}, *rows[1:-2], {"id": "new", "text": "a new mill", "lang": "fr"}]
    assert tickets.sync(changed) == {"in": 119, "embedded": 2, "unchanged": 117, "removed": 2}
    tickets.shows(changed)
    assert tickets.view("lang")["new"] == "fr"


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv", "parquet"])
def test_texts_of_a_sync_by_reference_stay_in_its_files(
    make_tickets: Callable[..., Tickets], tmp_path: Path, ending: str
) -> None:
    tickets = make_tickets(carry=["lang"])
    rows = rows_of(100)
    later = [{**row, "text": "other words"} if at % 10 == 3 else row for at, row in enumerate(rows)]
    for night, table in enumerate((rows, later)):
        source = written(tmp_path / f"night-{night}.{ending}", table)
        job = tickets.submit_files([source], by_reference=True)
        tickets.run(job)
        tickets.shows(table)
        kept = "select count(*), count(text) from vectormill.items where job_id = :job"
        assert run_sql(tickets.engine, kept, job=job) == [(10 if night else 100, 0)]
        assert set(tickets.view("lang").values()) == {"en", "de"}
        assert {row["state"] for row in chunk_rows(tickets.engine, job)} == {"done"}


def test_a_file_whose_rows_change_while_it_is_read_is_refused(
    tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets.by_reference = True
    places = Corpus.places
    for found in (lambda *given: islice(places(*given), 0), lambda *given: chain(places(*given), places(*given))):
        monkeypatch.setattr(Corpus, "places", found)
        with pytest.raises(SourceError, match="is it being written"):
            tickets.submit(rows_of(10))
    assert run_sql(tickets.engine, "select count(*) from vectormill.jobs") == [(0,)]


def written(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows in the format that a path's name says."""
    table = pa.Table.from_pylist(list(rows))
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=9)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_a_changed_column_updates_a_row_without_embedding_it(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    before = tickets.view()
    assert tickets.sync([{**row, "lang": "nl"} for row in rows]) == {"in": 10, "unchanged": 10}
    assert set(tickets.view("lang").values()) == {"nl"}
    assert tickets.view() == before
    assert run_sql(tickets.engine, "select sum(updated) from vectormill.syncs") == [(10,)]


def test_a_row_whose_text_is_null_loses_its_vector(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    emptied = [{**rows[0], "text": None}, *rows[1:]]
    assert tickets.sync(emptied, keep_rejected=True) == {"in": 10, "unchanged": 9, "rejected": 1}
    tickets.shows(rows)
    assert tickets.sync(emptied) == {"in": 10, "unchanged": 9, "rejected": 1, "removed": 1}
    tickets.shows(rows[1:])


def failed(tickets: Tickets, job: UUID) -> str | None:
    tickets.end(job)
    with tickets.engine.begin() as connection:
        found = jobs.by_id(connection, job)
    assert found is not None
    assert found.state is JobState.FAILED
    return found.reason


def test_a_source_that_shrank_removes_nothing(tickets: Tickets) -> None:
    rows = rows_of(200)
    tickets.sync(rows)
    job = tickets.submit(rows[:150])
    assert failed(tickets, job) == "too_many_removed"
    assert failed(tickets, tickets.submit([])) == "source_empty"
    tickets.shows(rows)
    assert tickets.sync(rows[:150], max_removed="25%") == {"in": 150, "unchanged": 150, "removed": 50}
    tickets.shows(rows[:150])


def test_a_delta_changes_only_what_it_names(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    delta: list[Row] = [
        {"id": "k1", "text": "another", "lang": "en", "gone": False},
        {"id": "k2", "text": None, "lang": None, "gone": True},
        {"id": "unknown", "text": None, "lang": None, "gone": True},
        {"id": "k11", "text": "a new one", "lang": "en", "gone": None},
    ]
    done = tickets.sync(delta, delta=True, removed_column="gone")
    assert done == {"in": 2, "embedded": 2, "removed": 1}
    expected: list[Row] = [rows[0], delta[0], *rows[3:], delta[3]]
    tickets.shows(expected)
    assert tickets.sync(expected) == {"in": 10, "unchanged": 10}
    assert tickets.sync([], delta=True) == {}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("policy", OnDuplicateKey)
def test_of_rows_with_one_key_one_counts(tickets: Tickets, policy: OnDuplicateKey, known: bool) -> None:
    first, second, third = ({"id": "k0", "text": f"version {n}", "lang": "en"} for n in range(3))
    others = rows_of(30)[1:]
    if known:
        tickets.sync([first, *others])
    done = tickets.sync([first, *others[:10], second, *others[10:], third], on_duplicate_key=policy)
    tickets.shows([third if policy is OnDuplicateKey.LAST else first, *others])
    rejected = 2 if policy is OnDuplicateKey.REJECT else 0
    assert done["in"] == 30 + rejected
    assert done.get("rejected", 0) == rejected
    embedded = (1 if policy is OnDuplicateKey.LAST else 0) if known else 30
    assert done.get("embedded", 0) == embedded
    assert run_sql(tickets.engine, "select repeated from vectormill.syncs order by job_id desc limit 1") == [
        (2 - rejected,)
    ]


def test_two_syncs_never_interleave(tickets: Tickets) -> None:
    rows = rows_of(20)
    job = tickets.submit(rows)
    with pytest.raises(CollectionBusy, match=str(job)):
        tickets.submit(rows)
    tickets.run(job)
    tickets.run(tickets.submit(rows))


def test_a_sync_whose_producer_died_makes_way(tickets: Tickets) -> None:
    rows = rows_of(20)
    job = tickets.submit(rows)
    run_sql(
        tickets.engine,
        "update vectormill.jobs set state = 'staging', lease_until = now() - interval '1 s' where id = :job",
        job=job,
    )
    assert tickets.sync(rows) == {"in": 20, "embedded": 20}
    assert run_sql(tickets.engine, "select count(*) from vectormill.jobs where id = :job", job=job) == [(0,)]
    assert run_sql(tickets.engine, "select count(*) from vectormill.syncs") == [(1,)]


@pytest.mark.parametrize("mutant", [False, True])
def test_keys_go_in_the_transaction_that_ends_the_sync(
    tickets: Tickets, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    """The dispatcher dies between the removal and the job's end. A mutant that commits the removal alone is seen."""
    rows = rows_of(10)
    tickets.sync(rows)
    job = tickets.submit(rows[:9])
    settle = syncs.settle

    def settle_alone(connection: Connection, *given: Any, **named: Any) -> str | None:
        found = settle(connection, *given, **named)
        connection.exec_driver_sql("commit and chain")
        return found

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "end", die)
        if mutant:
            patched.setattr(syncs, "settle", settle_alone)
        with pytest.raises(KeyboardInterrupt):
            tickets.end(job)
    assert (len(tickets.view()) == 10) is not mutant
    tickets.end(job)
    tickets.shows(rows[:9])


def shrunk(tickets: Tickets) -> UUID:
    """Submit a sync with a changed row that lacks too many keys; it fails."""
    rows = rows_of(200)
    tickets.sync(rows)
    job = tickets.submit([{**rows[0], "text": "changed"}, *rows[1:100]])
    drain_job(tickets.engine, job)
    assert failed(tickets, job) == "too_many_removed"
    return job


def test_a_refused_sync_is_not_retried(tickets: Tickets) -> None:
    job = shrunk(tickets)
    with tickets.engine.begin() as connection, pytest.raises(NotRetriable, match="max_removed"):
        control.retry(connection, job)
    assert len(tickets.view()) == 200


@pytest.mark.parametrize("meanwhile", ["undone", "done", "dropped"])
def test_a_sync_is_retried_only_while_it_is_the_latest(
    tickets: Tickets, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """A sync that was undone leaves what the one before it needs; one that was done doesn't."""
    rows = rows_of(20)
    tickets.sync(rows)
    changed = [{**row, "text": row["text"] + " now"} for row in rows[:19]]
    job = tickets.submit(changed)
    with tickets.engine.begin() as connection:
        control.fail(connection, job, Reason.SOURCE_CHANGED, "for a test")
    drain_job(tickets.engine, job)
    tickets.end(job)
    if meanwhile == "undone":
        with monkeypatch.context() as patched:
            patched.setattr(staging, "queue", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tickets.submit(rows)
    elif meanwhile == "done":
        tickets.sync(rows)
    else:
        with tickets.engine.begin() as connection:
            collections.drop_collection(connection, find_collection(connection, tickets.workspace, "tickets"))
    if meanwhile != "undone":
        with tickets.engine.begin() as connection, pytest.raises(NotRetriable, match="sync again"):
            control.retry(connection, job)
        return
    with tickets.engine.begin() as connection:
        assert control.retry(connection, job) > 0
    tickets.run(job)
    tickets.shows(changed)


def test_a_sync_whose_kept_bits_are_lost_removes_nothing(tickets: Tickets) -> None:
    rows = rows_of(20)
    tickets.sync(rows)
    job = tickets.submit(rows[:19])
    run_sql(tickets.engine, "delete from vectormill.sync_seen")
    assert failed(tickets, job) == "items_unaccounted"
    tickets.shows(rows)


def test_a_delta_of_nothing_but_a_null_text_removes_its_vector(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    done = tickets.sync([{**rows[3], "text": None}], delta=True)
    assert done == {"in": 1, "rejected": 1, "removed": 1}
    tickets.shows([*rows[:3], *rows[4:]])


def test_a_later_null_row_does_not_take_a_good_one_with_it(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    done = tickets.sync([*rows, {**rows[0], "text": None}], on_duplicate_key="reject")
    assert done == {"in": 11, "unchanged": 10, "rejected": 1}
    assert run_sql(tickets.engine, "select code from vectormill.rejects") == [("duplicate_key",)]
    tickets.shows(rows)


def test_rows_that_come_twice_and_are_the_same_stay_as_they_are(tickets: Tickets) -> None:
    rows = rows_of(10)
    tickets.sync(rows)
    assert tickets.sync([*rows, *rows, rows[0]]) == {"in": 10, "unchanged": 10}
    back = [{**rows[0], "lang": "nl"}, *rows]
    assert tickets.sync(back) == {"in": 10, "unchanged": 10}
    assert tickets.view("lang")["k0"] == rows[0]["lang"]


def test_a_sync_that_builds_an_index_waits_in_the_long_lane(tickets: Tickets) -> None:
    """Two of them at a time must not hold up the ends of all other jobs."""
    for lane in (True, False):  # the first sync builds it
        job = tickets.submit(rows_of(20 if lane else 21))
        tickets.embed(job)
        with tickets.engine.begin() as connection:
            assert finalize.due(connection, 10, long=lane) == [job]
            assert finalize.due(connection, 10, long=not lane) == []
        tickets.end(job)


def test_a_long_end_holds_no_duty_up(tickets: Tickets) -> None:
    rows = rows_of(10)
    job = tickets.submit(rows)
    tickets.embed(job)
    with tickets.engine.begin() as other:
        jobs.lock(other, job)
        completion.end(tickets.engine, job, finalized="")
    tickets.end(job)
    tickets.shows(rows)
