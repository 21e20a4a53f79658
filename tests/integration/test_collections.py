"""Collections on a real Postgres, with a real model: what they are made of, what readers see, and searches."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from pipeline.catalog.models import workspace_id
from pipeline.core.errors import UserError
from pipeline.core.options import JobOptions
from pipeline.db import collections as stored
from pipeline.ingest.collections import create_collection
from pipeline.jobs.search import SearchRequest, collection_to_search
from tests.integration.tickets import Tickets, rows_of
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
