"""Upgrades of a collection on a real Postgres: a second vector space beside the first, and the swap between them."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sqlalchemy import Connection, Engine, text

from pipeline.catalog.models import add_model
from pipeline.core.collection_status import CollectionStatus, VersionStatus
from pipeline.core.collections import VersionState
from pipeline.core.errors import CollectionBusy, NotRetriable, UserError, Waiting
from pipeline.core.jobs import Reason
from pipeline.core.options import JobOptions
from pipeline.db import chunks, collection_versions, models, staging
from pipeline.dispatch import maintenance
from pipeline.dispatch.background import TASKS
from pipeline.dispatch.state import Dispatcher
from pipeline.ingest.collections import create_collection, upgrade_collection
from pipeline.jobs import collections, control
from pipeline.jobs.collections import find_collection
from pipeline.jobs.comparison import compare
from pipeline.jobs.search import SearchRequest, collection_to_search
from tests.acceptance.fleet import eventually
from tests.integration.tickets import SMALL, Tickets, beside, rows_of, sync_both, upgrade
from tests.support.jobs_made import run_sql
from tests.support.models import described, static_folder
from workers.encoders.local import LocalEncoder


def status(tickets: Tickets) -> CollectionStatus:
    with tickets.engine.begin() as connection:
        found = find_collection(connection, tickets.workspace, "tickets")
        return collections.collection_status(connection, found)


def version(tickets: Tickets, state: VersionState) -> VersionStatus:
    return next(each for each in status(tickets).versions if each.state is state)


def swap(tickets: Tickets, act: Any = collections.swap, **how: Any) -> None:
    with tickets.engine.begin() as connection:
        act(connection, find_collection(connection, tickets.workspace, "tickets"), **how)


def dimensions(tickets: Tickets) -> int:
    (size,) = run_sql(
        tickets.engine,
        "select atttypmod from pg_attribute where attrelid = 'vectormill.tickets'::regclass and attname = 'vector'",
    )[0]
    return int(size)


def shows_small(tickets: Tickets, rows: Sequence[Mapping[str, Any]], library: SentenceTransformer) -> None:
    """Assert that readers see a fresh embedding of these rows by the model `small`."""
    seen = tickets.view()
    assert seen.keys() == {str(row["id"]) for row in rows}
    for row, vector in zip(rows, library.encode([row["text"] for row in rows]), strict=True):
        np.testing.assert_allclose(json.loads(seen[str(row["id"])]), vector, atol=1e-5)


def test_an_upgrade_fills_a_second_version_and_readers_swap(
    upgraded: Tickets, small_library: SentenceTransformer
) -> None:
    rows = rows_of(120)
    sync_both(upgraded, rows)
    assert dimensions(upgraded) == 256
    changed = [{**rows[0], "text": "another mill"}, *rows[2:]]
    sync_both(upgraded, changed)
    upgraded.shows(changed)
    before = version(upgraded, VersionState.NEXT)
    assert (before.model, before.keys, before.differs, before.running) == ("small", 119, None, None)
    swap(upgraded, keep=timedelta(days=2))
    shows_small(upgraded, changed, small_library)
    assert dimensions(upgraded) == SMALL
    after = version(upgraded, VersionState.PREVIOUS)
    assert (status(upgraded).model, after.model, after.differs) == ("small", "static", None)
    assert after.kept_until is not None
    sync_both(upgraded, rows)  # to both still
    swap(upgraded, collections.swap_back)
    upgraded.shows(rows)
    assert (status(upgraded).model, version(upgraded, VersionState.NEXT).model) == ("static", "small")
    swap(upgraded)
    shows_small(upgraded, rows, small_library)
    history = run_sql(upgraded.engine, "select count(*), count(beside) from vectormill.syncs")
    assert history == [(6, 3)]


def test_a_version_that_lacks_something_is_not_given_to_readers(upgraded: Tickets) -> None:
    rows = rows_of(120)
    with pytest.raises(UserError, match="no whole sync has reached it yet"):
        swap(upgraded)
    leader = upgraded.submit(rows)
    upgraded.run(leader)
    with pytest.raises(CollectionBusy, match=str(beside(upgraded, leader))):
        swap(upgraded)
    upgraded.run(beside(upgraded, leader))
    # Its leader fails, since too much would go; the other isn't even begun.
    refused = upgraded.submit(rows[:20])
    assert run_sql(upgraded.engine, "select count(*) from vectormill.syncs where beside = :job", job=refused) == [(0,)]
    upgraded.end(refused)
    assert version(upgraded, VersionState.NEXT).differs is None
    # A delta that reached the current version alone.
    delta = upgraded.submit([{**rows[0], "text": "new"}], delta=True)
    run_sql(upgraded.engine, "update vectormill.jobs set state = 'failed' where id = :job", job=beside(upgraded, delta))
    upgraded.run(delta)
    with pytest.raises(UserError, match=f"sync {delta} has reached only one"):
        swap(upgraded)
    sync_both(upgraded, rows)
    swap(upgraded)


@pytest.mark.parametrize("mutant", [False, True])
def test_a_swap_moves_all_or_nothing(upgraded: Tickets, monkeypatch: pytest.MonkeyPatch, mutant: bool) -> None:
    """The view can't be changed. A mutant that moves the model behind the name before the view is seen."""
    if mutant:
        _move_the_name_first(monkeypatch)
    rows = rows_of(20)
    sync_both(upgraded, rows)
    run_sql(upgraded.engine, "create view public.depends as select vector from vectormill.tickets")
    with pytest.raises(UserError, match="can't be swapped now"):
        swap(upgraded)
    with upgraded.engine.begin() as connection:
        found = models.of_collection(connection, upgraded.workspace, "tickets")
    assert found is not None
    assert dimensions(upgraded) == 256
    assert (found["name"] == "static") is not mutant
    if mutant:
        return
    run_sql(upgraded.engine, "drop view public.depends")
    swap(upgraded)


def _move_the_name_first(monkeypatch: pytest.MonkeyPatch) -> None:
    move = collection_versions.move

    def move_at_once(connection: Connection, *arguments: Any, **named: Any) -> None:
        move(connection, *arguments, **named)
        connection.connection.driver_connection.execute("commit and chain")  # type: ignore[union-attr]

    monkeypatch.setattr(collection_versions, "move", move_at_once)


@pytest.mark.parametrize("mutant", [False, True])
def test_in_no_moment_do_view_and_name_differ(upgraded: Tickets, monkeypatch: pytest.MonkeyPatch, mutant: bool) -> None:
    """A mutant that moves the model behind the name before the view is seen."""
    if mutant:
        _move_the_name_first(monkeypatch)
    sync_both(upgraded, rows_of(20))
    query = text("""
        select a.atttypmod = s.dimensions from pg_attribute a, vectormill.collection_versions v
        join vectormill.vector_spaces s on s.id = v.vector_space_id
        where v.state = 'current' and a.attname = 'vector' and a.attrelid = (
          select oid from pg_class where relname = 'tickets' and relnamespace = 'vectormill'::regnamespace)
    """)
    stop, seen = threading.Event(), set[bool]()

    def look() -> None:
        while not stop.is_set():
            with upgraded.engine.begin() as connection:
                seen.add(bool(connection.execute(query).scalar_one()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(10):
            swap(upgraded)
            swap(upgraded, collections.swap_back)
    finally:
        stop.set()
        looking.join()
    assert (seen == {True}) is not mutant


def test_readers_keep_their_rights_on_the_view(upgraded: Tickets) -> None:
    role = "reader_of_tickets"
    sync_both(upgraded, rows_of(20))
    run_sql(upgraded.engine, f"drop role if exists {role}")
    run_sql(upgraded.engine, f"create role {role}")
    run_sql(upgraded.engine, f"grant select on vectormill.tickets to {role} with grant option")
    run_sql(upgraded.engine, f"grant update (lang) on vectormill.tickets to {role}")
    try:
        swap(upgraded)
        allowed = run_sql(
            upgraded.engine,
            f"select has_table_privilege('{role}', 'vectormill.tickets', 'select with grant option'), "
            f"has_table_privilege('{role}', 'vectormill.tickets', 'insert'), "
            f"has_column_privilege('{role}', 'vectormill.tickets', 'lang', 'update')",
        )
        assert allowed == [(True, False, True)]
    finally:
        run_sql(upgraded.engine, f"drop owned by {role}")
        run_sql(upgraded.engine, f"drop role {role}")


def test_old_versions_go(upgraded: Tickets, dispatcher: Dispatcher) -> None:
    sync_both(upgraded, rows_of(20))
    swap(upgraded, keep=timedelta(days=1))
    maintenance.maintain(dispatcher)
    assert len(status(upgraded).versions) == 1
    run_sql(
        upgraded.engine,
        "update vectormill.collection_versions set kept_until = now() - interval '1 s' where state = 'previous'",
    )
    maintenance.maintain(dispatcher)
    assert status(upgraded).versions == []
    with pytest.raises(UserError, match="no previous version"):
        swap(upgraded, collections.swap_back)
    (task,) = (each for each in TASKS if each.name == "drop_version")
    with upgraded.engine.begin() as connection:
        (gone,) = task.due(connection, 10)
    with upgraded.engine.begin() as connection, upgraded.engine.connect() as other:
        other.execute(text("select count(*) from vectormill.collection_keys"))
        with pytest.raises(Waiting):
            collection_versions.drop(connection, int(str(gone)))
        connection.rollback()
    with upgraded.engine.begin() as connection:
        collection_versions.drop(connection, int(str(gone)))
        assert task.due(connection, 10) == []
    tables = run_sql(upgraded.engine, "select count(*) from pg_class where relname like 'collection\\_keys\\__'")
    assert tables == [(1,)]
    swapped = rows_of(21)
    upgraded.run(upgraded.submit(swapped))
    assert len(upgraded.view("lang")) == 21


def test_an_upgrade_is_abandoned(upgraded: Tickets) -> None:
    with pytest.raises(UserError, match="is being filled already"):
        upgrade(upgraded)
    leader = upgraded.submit(rows_of(20))
    swap(upgraded, collections.abandon_upgrade)
    (state,) = run_sql(
        upgraded.engine, "select state from vectormill.jobs where id = :job", job=beside(upgraded, leader)
    )[0]
    assert state in ("cancelling", "cancelled")
    upgraded.run(leader)
    assert status(upgraded).versions == []
    with pytest.raises(UserError, match="has the vectors of this model"):
        upgrade(upgraded, "static")
    upgrade(upgraded)


def test_both_versions_are_searched_and_compared(upgraded: Tickets, small_library: SentenceTransformer) -> None:
    rows = rows_of(200)
    sync_both(upgraded, rows)
    with upgraded.engine.begin() as connection:
        compared = compare(connection, find_collection(connection, upgraded.workspace, "tickets"))
        following = collection_to_search(connection, upgraded.workspace, "tickets", VersionState.NEXT)
        query = small_library.encode(rows[7]["text"]).tolist()
        hits = following.nearest(connection, query, SearchRequest(query="asked", limit=1, version=VersionState.NEXT))
    assert [hit.key for hit in hits] == ["k7"]
    assert (compared.keys, compared.next_keys, compared.model, compared.next_model) == (200, 200, "static", "small")
    assert compared.tokens > 200
    assert 50 < compared.sampled <= 100
    assert compared.overlap_at_10 is not None
    assert 0.1 < compared.overlap_at_10 < 1


def test_the_same_sync_is_attached_to_in_each_version(upgraded: Tickets) -> None:
    rows = rows_of(20)
    leader = upgraded.submit(rows, key="night 1")
    upgraded.run(leader)
    upgraded.run(beside(upgraded, leader))
    assert upgraded.submit(rows, key="night 1") == leader
    assert run_sql(upgraded.engine, "select count(*) from vectormill.syncs") == [(2,)]


def test_a_collection_is_not_called_as_a_model(upgraded: Tickets) -> None:
    with upgraded.engine.begin() as connection, pytest.raises(UserError, match="a model is called so"):
        create_collection(connection, upgraded.workspace, "small", model="static", options=JobOptions())


def test_each_version_has_its_own_table_of_the_user(
    make_tickets: Callable[..., Tickets], small_encoder: LocalEncoder, engine: Engine
) -> None:
    run_sql(engine, "create table public.notes (id text primary key, embedding vector(256))")
    run_sql(engine, "create table public.small_notes (id text primary key, embedding vector(64))")
    tickets = make_tickets(into="public.notes")
    tickets.encoders["small"] = small_encoder
    with engine.begin() as connection:
        add_model(connection, "small", described("static-64", static_folder(SMALL)))
    with pytest.raises(UserError, match="name another table"):
        upgrade(tickets)
    with engine.begin() as connection:
        upgrade_collection(connection, tickets.workspace, "tickets", model="small", into="public.small_notes")
    sync_both(tickets, rows_of(5))
    sync_both(tickets, rows_of(4))
    counts = "select (select count(*) from public.notes), (select count(*) from public.small_notes)"
    assert run_sql(engine, counts) == [(4, 4)]
    swap(tickets)
    assert dimensions(tickets) == SMALL


def test_an_old_source_that_is_sent_again_changes_no_version(upgraded: Tickets) -> None:
    rows = rows_of(20)
    first = upgraded.submit(rows, key="night 1")
    upgraded.run(first)
    lost = beside(upgraded, first)
    with upgraded.engine.begin() as connection:
        control.cancel(connection, lost)
        chunks.cancel_pending(connection, lost, 0, 1_000)
    upgraded.end(lost)
    # As if the command had been killed before it: nothing is known of that job.
    run_sql(upgraded.engine, "update vectormill.jobs set idempotency_key = null where id = :job", job=lost)
    newer = [{**rows[0], "text": "newer"}, *rows[1:]]
    folder = upgraded.folder
    upgraded.folder = folder / "second"
    upgraded.folder.mkdir()
    sync_both(upgraded, newer)
    upgraded.folder = folder
    assert upgraded.submit(rows, key="night 1") == first
    beside_it = "select count(*) from vectormill.syncs where beside = :job"
    assert run_sql(upgraded.engine, beside_it, job=first) == [(1,)]
    swap(upgraded)


@pytest.mark.parametrize("delta", [True, False])
def test_syncs_that_came_in_another_order_are_seen(upgraded: Tickets, delta: bool) -> None:
    rows = rows_of(20)
    sync_both(upgraded, rows)
    rest = [] if delta else rows[1:]
    sync_both(upgraded, [{**rows[0], "text": "one"}, *rest], delta=delta)
    sync_both(upgraded, [{**rows[0], "text": "two"}, *rest], delta=delta)
    assert version(upgraded, VersionState.NEXT).differs is None
    others = "select job_id, last_slot from vectormill.syncs where beside is not null order by job_id"
    _, (one, first), (two, last) = run_sql(upgraded.engine, others)
    for job, slot in ((one, last), (two, first)):
        run_sql(
            upgraded.engine, "update vectormill.syncs set last_slot = :slot where job_id = :job", job=job, slot=slot
        )
    assert "in another order" in str(version(upgraded, VersionState.NEXT).differs)


def test_a_sync_that_failed_midway_counts_by_what_it_changed(upgraded: Tickets) -> None:
    rows = rows_of(20)
    sync_both(upgraded, rows)
    changed = [{**row, "text": row["text"] + " now"} for row in rows]
    leader = upgraded.submit(changed)
    with pytest.raises(CollectionBusy, match=str(leader)):
        swap(upgraded)
    upgraded.run_chunk(leader, 0)
    for job in (leader, beside(upgraded, leader)):
        with upgraded.engine.begin() as connection:
            control.fail(connection, job, Reason.SOURCE_CHANGED, "for a test")
            chunks.cancel_pending(connection, job, 0, 1_000)
        upgraded.end(job)
    with pytest.raises(UserError, match=f"sync {leader} has reached only one"):
        swap(upgraded)
    sync_both(upgraded, changed)
    swap(upgraded)


def test_a_version_that_missed_a_removal_catches_up(upgraded: Tickets) -> None:
    rows = rows_of(200)
    sync_both(upgraded, rows)
    leader = upgraded.submit(rows[:100], max_removed="50%")
    lost = beside(upgraded, leader)
    upgraded.run(leader)
    with upgraded.engine.begin() as connection:
        control.cancel(connection, lost)
        chunks.cancel_pending(connection, lost, 0, 1_000)
    upgraded.end(lost)
    sync_both(upgraded, rows[:100])
    assert version(upgraded, VersionState.NEXT).differs is None


def test_a_version_whose_earlier_sync_goes_on_is_waited_for(upgraded: Tickets) -> None:
    rows = rows_of(20)
    first = upgraded.submit(rows)
    upgraded.run(first)
    slow = beside(upgraded, first)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(upgraded.submit, [*rows, {"id": "new", "text": "a new one", "lang": "en"}], queue=True)
        leader = eventually(
            lambda: run_sql(
                upgraded.engine, "select id from vectormill.jobs where id > :job and state = 'queued'", job=slow
            ),
            "the second sync",
        )[0][0]
        upgraded.run(UUID(str(leader)))
        upgraded.run(slow)
        assert second.result(60) == UUID(str(leader))
    upgraded.run(beside(upgraded, UUID(str(leader))))
    assert version(upgraded, VersionState.NEXT).differs is None


def test_a_sync_that_is_cancelled_is_cancelled_in_all_versions(upgraded: Tickets) -> None:
    leader = upgraded.submit(rows_of(20))
    with upgraded.engine.begin() as connection:
        control.cancel(connection, leader)
    states = "select distinct state from vectormill.jobs"
    assert run_sql(upgraded.engine, states) == [("cancelling",)]


def test_an_upgrade_is_abandoned_while_it_is_staged(upgraded: Tickets, dispatcher: Dispatcher) -> None:
    job = beside(upgraded, upgraded.submit(rows_of(20)))
    run_sql(upgraded.engine, "update vectormill.jobs set state = 'staging' where id = :job", job=job)
    swap(upgraded, collections.abandon_upgrade)
    with upgraded.engine.begin() as connection:
        assert collection_versions.gone(connection, 10) == []
        (dead,) = staging.dead(connection, 86_400, 10)
        assert dead.job_id == job


def test_a_sync_of_a_version_that_is_gone_is_not_retried(upgraded: Tickets) -> None:
    leader = upgraded.submit(rows_of(20))
    other = beside(upgraded, leader)
    with upgraded.engine.begin() as connection:
        control.fail(connection, other, Reason.SOURCE_CHANGED, "for a test")
        chunks.cancel_pending(connection, other, 0, 1_000)
    upgraded.end(other)
    swap(upgraded, collections.abandon_upgrade)
    with upgraded.engine.begin() as connection, pytest.raises(NotRetriable):
        control.retry(connection, other)


def test_a_sync_is_attached_to_across_a_swap(upgraded: Tickets) -> None:
    rows = rows_of(20)
    leader = upgraded.submit(rows, key="night 1")
    upgraded.run(leader)
    upgraded.run(beside(upgraded, leader))
    swap(upgraded)
    assert upgraded.submit(rows, key="night 1") == leader
    assert run_sql(upgraded.engine, "select count(*) from vectormill.syncs") == [(2,)]


def test_no_model_takes_the_name_of_a_collection(upgraded: Tickets, static_description: dict[str, Any]) -> None:
    with upgraded.engine.begin() as connection, pytest.raises(UserError, match="or a collection, is called"):
        add_model(connection, "tickets", static_description)
    with upgraded.engine.begin() as connection, pytest.raises(UserError, match="or a collection, is called"):
        add_model(connection, "other", static_description, ["tickets"])
