"""Collections on a real Postgres, with a real model: what they are made of, what readers see, and searches."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from pipeline.catalog.models import workspace_id
from pipeline.core.errors import UserError
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.db import collections as stored
from pipeline.db import jobs
from pipeline.ingest.collections import create_collection
from pipeline.jobs import control
from pipeline.jobs.search import SearchRequest, collection_to_search
from tests.integration.tickets import Row, Tickets, rows_of
from tests.support.jobs_made import run_sql


def test_readers_see_all_of_an_atomic_sync_or_nothing(tickets: Tickets) -> None:
    rows = rows_of(20)
    tickets.sync(rows)
    after = [{**row, "text": row["text"] + " now"} for row in rows[:18]]
    job = tickets.submit(after, atomic=True)
    tickets.embed(job)
    tickets.shows(rows)
    tickets.end(job)
    tickets.shows(after)


def test_passages_of_a_key_are_replaced(engine: Engine, make_tickets: Callable[..., Tickets]) -> None:
    tickets = make_tickets(split=16)
    long = " ".join(f"word{n}" for n in range(80))
    tickets.sync([{"id": "a", "text": long}, {"id": "b", "text": "short"}])
    passages = run_sql(engine, "select key, passage, start, stop from vectormill.tickets order by 1, 2")
    assert [row[:2] for row in passages] == [*(("a", n) for n in range(len(passages) - 1)), ("b", 0)]
    assert len(passages) > 3
    assert tickets.sync([{"id": "a", "text": "short now"}, {"id": "b", "text": "short"}]) == {
        "in": 2, "embedded": 1, "unchanged": 1,
    }  # fmt: skip
    assert run_sql(engine, "select key, passage from vectormill.tickets order by 1") == [("a", 0), ("b", 0)]


def test_a_collection_has_its_index(tickets: Tickets) -> None:
    tickets.sync(rows_of(300))
    with tickets.engine.begin() as connection:
        connection.execute(text("set local enable_seqscan = off"))
        connection.execute(text("set local enable_sort = off"))
        plan = "\n".join(
            connection.scalars(
                text(
                    "explain select key from vectormill.tickets order by vector <=> "
                    "(select vector from vectormill.tickets where key = 'k1') limit 3"
                )
            )
        )
    assert "_hnsw" in plan


def test_the_index_is_built_once_there_are_vectors(tickets: Tickets) -> None:
    """Not over the empty table of a first atomic sync, whose end would add each vector to it."""
    indexes = "select count(*) from pg_indexes where schemaname = 'vectormill' and indexname like '%_hnsw'"
    for expected in (0, 1):
        tickets.sync(rows_of(20), atomic=True)
        assert run_sql(tickets.engine, indexes) == [(expected,)]


def test_options_that_a_collection_cannot_have_are_refused(engine: Engine, static: None) -> None:
    with engine.begin() as connection:
        workspace = workspace_id(connection)

        def create(name: str = "other", **options: Any) -> None:
            wish = JobOptions.model_validate(options)
            create_collection(connection, workspace, name, model="static", options=wish)

        create()
        with pytest.raises(UserError, match="already"):
            create()
        with pytest.raises(UserError, match="has a table of this name"):
            create("jobs")
        with pytest.raises(UserError, match="letters"):
            create('no "quotes"')
        with pytest.raises(UserError, match="letters"):
            create("x" * 70)
        with pytest.raises(UserError, match="letters"):
            create("team.docs")
        with pytest.raises(UserError, match="has a table of this name"):
            create("items_2031_01")
        with pytest.raises(UserError, match="63 bytes"):
            create("third", carry=["ü" * 40])
        with pytest.raises(UserError, match="already"):
            create("third", carry=["vector"])
        with pytest.raises(UserError, match="no such option"):
            create("third", by_reference=True)


def test_a_search_finds_what_carries_a_value(tickets: Tickets) -> None:
    rows = rows_of(3_000)
    rows[77] |= {"lang": "fi"}
    tickets.sync(rows)
    (query,) = tickets.fresh([rows[42]]).values()
    with tickets.engine.begin() as connection:
        found = collection_to_search(connection, tickets.workspace, "tickets")

        def keys(**wish: Any) -> list[str | None]:
            return [hit.key for hit in found.nearest(connection, query, SearchRequest(query="asked", **wish))]

        assert keys(limit=1) == ["k42"]
        assert set(keys(limit=50, where={"lang": "en"})) <= {f"k{n}" for n in range(1, 3_000, 2)}
        assert keys(where={"lang": "fi"}) == ["k77"], "though the index gives up long before"
        assert keys(where={"lang": "xx"}) == []
        with pytest.raises(UserError, match='no carried column "size"; columns are lang'):
            keys(where={"size": "1"})


def test_a_search_in_passages_says_where_they_are(engine: Engine, make_tickets: Callable[..., Tickets]) -> None:
    tickets = make_tickets(split=16)
    text = "Mills grind grain. " * 20 + "A refund was paid."
    tickets.sync([{"id": "a", "text": text}])
    (query,) = tickets.fresh([{"id": "q", "text": "A refund was paid."}]).values()
    with engine.begin() as connection:
        found = collection_to_search(connection, tickets.workspace, "tickets")
        (hit,) = found.nearest(connection, query, SearchRequest(query="asked", limit=1))
    assert hit.passage is not None
    assert "refund" in text[hit.start : hit.stop]


def test_another_model_of_the_name_is_refused(tickets: Tickets) -> None:
    tickets.sync(rows_of(10))
    run_sql(tickets.engine, "update vectormill.models set weights_sha256 = 'others' where name = 'static'")
    with pytest.raises(UserError, match="isn't what it was"):
        tickets.submit(rows_of(11))


def test_keys_of_any_letters(tickets: Tickets) -> None:
    keys = ["ä", "'; drop table x; --", "a\tb", "𝄞", " ", "\\", "k" * 900]
    rows = [{"id": key, "text": f"text {at}", "lang": "en"} for at, key in enumerate(keys)]
    tickets.sync(rows)
    assert tickets.sync(rows) == {"in": 7, "unchanged": 7}
    tickets.shows(rows)


def test_half_precision(make_tickets: Callable[..., Tickets]) -> None:
    tickets, rows = make_tickets(dtype="float16"), rows_of(20)
    tickets.sync(rows)
    seen, wanted = tickets.view(), tickets.fresh(rows)
    for key, vector in wanted.items():
        np.testing.assert_allclose(json.loads(seen[key]), vector, atol=1e-2)


def test_a_collection_is_overdue_from_its_last_sync_on(tickets: Tickets) -> None:
    def expected() -> list[tuple[str, bool]]:
        with tickets.engine.begin() as connection:
            return [(each.view, each.overdue_seconds > 3_000) for each in stored.expected(connection, 10)]

    assert expected() == []
    run_sql(
        tickets.engine,
        "update vectormill.collections set expect_every = '1 h', created_at = now() - interval '2 h'",
    )
    assert expected() == [("tickets", True)]
    tickets.sync(rows_of(3))
    assert expected() == [("tickets", False)]
    run_sql(tickets.engine, "update vectormill.syncs set settled_at = now() - interval '2 h'")
    assert expected() == [("tickets", True)]


_INTO = "create table public.notes (id text primary key, embedding vector(256), note text)"


def in_table(tickets: Tickets, columns: str = "id") -> set[str]:
    return {str(row[0]) for row in run_sql(tickets.engine, f"select {columns} from public.notes")}


def test_a_table_of_the_user_follows_the_collection(engine: Engine, make_tickets: Callable[..., Tickets]) -> None:
    run_sql(engine, _INTO)
    tickets = make_tickets(into="public.notes", hnsw=True)
    run_sql(engine, "insert into public.notes (id, note) values ('own', 'not of the collection')")
    rows = rows_of(20)
    tickets.sync(rows)
    changed: list[Row] = [{**rows[0], "text": "another"}, {**rows[1], "text": None}, *rows[3:]]
    tickets.sync(changed, atomic=True)
    tickets.shows([changed[0], *changed[2:]])
    same = run_sql(
        engine,
        "select count(*), count(*) filter (where n.embedding = t.vector) from vectormill.tickets t "
        "left join public.notes n on n.id = t.key",
    )
    assert same == [(18, 18)]
    assert in_table(tickets) == {"own", "k0", *(f"k{n}" for n in range(3, 20))}
    tickets.sync([{"id": "k3", "text": None, "gone": True}], delta=True, removed_column="gone")
    assert "k3" not in in_table(tickets)
    more = JobOptions(into="notes")
    with engine.begin() as connection, pytest.raises(UserError, match="it has rows"):
        create_collection(connection, tickets.workspace, "more", model="static", options=more)
    run_sql(engine, "delete from public.notes")
    with engine.begin() as connection, pytest.raises(UserError, match="the collection tickets writes to this table"):
        create_collection(connection, tickets.workspace, "more", model="static", options=more)


def test_passages_in_a_table_of_the_user_go_with_their_key(
    engine: Engine, make_tickets: Callable[..., Tickets]
) -> None:
    run_sql(
        engine,
        "create table public.notes (id text, passage int, start int, stop int, embedding vector(256), "
        "primary key (id, passage))",
    )
    tickets = make_tickets(into="public.notes", split=16)
    long = " ".join(f"word{n}" for n in range(80))
    tickets.sync([{"id": "a", "text": long}, {"id": "b", "text": long}, {"id": "c", "text": "short"}])
    tickets.sync([{"id": "a", "text": "short now"}, {"id": "c", "text": "short"}], max_removed="100%")
    assert in_table(tickets, "id || ' ' || passage") == {"a 0", "c 0"}


def test_a_key_that_the_users_table_writes_otherwise_is_rejected(
    engine: Engine, make_tickets: Callable[..., Tickets]
) -> None:
    run_sql(engine, "create table public.notes (id bigint primary key, embedding vector(256))")
    tickets = make_tickets(into="public.notes")
    rows: list[Row] = [{"id": "7", "text": "a mill"}, {"id": "07", "text": "another"}, {"id": "x", "text": "third"}]
    done = tickets.sync(rows, max_rejects="100%")
    assert done == {"in": 3, "embedded": 1, "rejected": 2}
    assert in_table(tickets) == {"7"}


def test_a_uuid_that_the_users_table_writes_otherwise_is_rejected(
    engine: Engine, make_tickets: Callable[..., Tickets]
) -> None:
    run_sql(engine, "create table public.notes (id uuid primary key, embedding vector(256))")
    tickets = make_tickets(into="public.notes")
    key = "0198c2d1-6f00-7c3a-9d41-2b7e5a1c9f10"
    tickets.sync([{"id": key, "text": "a mill"}])
    done = tickets.sync(
        [{"id": other, "text": "a mill"} for other in (key, key.replace("-", ""), key.upper())], max_rejects="100%"
    )
    assert done == {"in": 3, "unchanged": 1, "rejected": 2}
    assert in_table(tickets) == {key}


@pytest.mark.parametrize("fault", ["renamed", "referenced"])
def test_a_table_that_refuses_a_removal_pauses_the_sync(
    engine: Engine, make_tickets: Callable[..., Tickets], fault: str
) -> None:
    break_it, mend_it = {
        "renamed": (
            "alter table public.notes rename column id to other",
            "alter table public.notes rename column other to id",
        ),
        "referenced": (
            "create table public.refers as select 'k0' as id; "
            "alter table public.refers add foreign key (id) references public.notes",
            "drop table public.refers",
        ),
    }[fault]
    run_sql(engine, _INTO)
    tickets = make_tickets(into="public.notes")
    rows = rows_of(20)
    tickets.sync(rows)
    job = tickets.submit(rows[1:])
    run_sql(engine, break_it)
    tickets.end(job)
    with engine.begin() as connection:
        found = jobs.by_id(connection, job)
    assert found is not None
    assert (found.state, found.reason) == (JobState.PAUSED, "table_refused")
    tickets.shows(rows)
    run_sql(engine, mend_it)
    with engine.begin() as connection:
        control.resume(connection, job)
    tickets.end(job)
    tickets.shows(rows[1:])
    assert in_table(tickets) == {str(row["id"]) for row in rows[1:]}
