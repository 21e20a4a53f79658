"""Collections on a real Postgres, with a real model: syncs embed what changed, and remove what the source lacks."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sqlalchemy import Connection, Engine, text

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.core.collections import OnDuplicateKey
from pipeline.core.errors import CollectionBusy, NotRetriable, UserError
from pipeline.core.jobs import JobState, Reason
from pipeline.core.options import JobOptions
from pipeline.db import chunks, jobs, staging, syncs
from pipeline.db import collections as stored
from pipeline.dispatch import completion, finalize
from pipeline.infra.settings import Settings
from pipeline.ingest.submission import planning
from pipeline.ingest.sync import SyncRequest, columns_of, create_collection, submission_of, sync_collection
from pipeline.jobs import collections, control
from pipeline.jobs.collections import find_collection
from pipeline.jobs.search import SearchRequest, collection_to_search
from pipeline.jobs.verification import verified_receipt
from pipeline.sources import Corpus
from tests.support.jobs_made import chunk_rows, run_sql, taken
from workers.encoders.local import LocalEncoder
from workers.runner.run_chunk import run_chunk
from workers.watchdog import Watch

Row = Mapping[str, Any]


class Tickets:
    """A collection, and what its user does with it."""

    def __init__(
        self, engine: Engine, encoder: LocalEncoder, library: SentenceTransformer, folder: Path, **options: Any
    ) -> None:
        self.engine, self._encoder, self._library, self._folder = engine, encoder, library, folder
        with engine.begin() as connection:
            self.workspace = workspace_id(connection)
            wish = JobOptions.model_validate(options)
            create_collection(connection, self.workspace, "tickets", model="static", options=wish)

    def submit(self, rows: Sequence[Row], *, queue: bool = False, key: str | None = None, **wish: Any) -> UUID:
        """Submit a sync of these rows."""
        path = self._folder / "source.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with self.engine.begin() as connection:
            collection = find_collection(connection, self.workspace, "tickets")
            model = find_model(connection, self.workspace, collection.model)
        asked = SyncRequest.model_validate(wish)
        corpus = Corpus([str(path)], columns_of(collection, asked), 1_000_000)
        plan = replace(planning(Settings()), chunk_items=7)
        submission = submission_of(collection, model, asked, corpus, plan, key)
        return sync_collection(self.engine, submission, queue=queue).job_id

    def run(self, job: UUID) -> None:
        """Embed a sync's chunks, and end it."""
        self.embed(job)
        self.end(job)

    def embed(self, job: UUID) -> None:
        """Embed a sync's chunks."""
        for ordinal, row in enumerate(chunk_rows(self.engine, job)):
            if row["state"] == "pending":
                self.run_chunk(job, ordinal)

    def run_chunk(self, job: UUID, ordinal: int) -> None:
        claim = taken(self.engine, job, ordinal)
        run_chunk(self.engine, self._encoder, claim, Watch(hung_after_seconds=60, most_seconds=60), lambda: None)

    def end(self, job: UUID) -> None:
        finalize.finalize(self.engine, job)

    def sync(self, rows: Sequence[Row], **how: Any) -> dict[str, int]:
        """Sync these rows to the end; return the counts of the verified receipt that aren't zero."""
        job = self.submit(rows, **how)
        self.run(job)
        with self.engine.begin() as connection:
            found = jobs.by_id(connection, job)
            receipt = verified_receipt(connection, job)
        assert found is not None
        assert found.state is JobState.COMPLETED, found.message
        assert receipt.verified
        return {name: count for name, count in receipt.items.model_dump(by_alias=True).items() if count}

    def view(self, *columns: str) -> dict[str, Any]:
        """Return what readers see: vectors by key, or these columns by key."""
        wanted = ", ".join(columns or ("vector::text",))
        rows = run_sql(self.engine, f"select key, {wanted} from vectormill.tickets")
        return {row[0]: row[1] if len(row) == 2 else tuple(row[1:]) for row in rows}

    def fresh(self, rows: Sequence[Row], text: str = "text") -> dict[str, list[float]]:
        """Embed rows anew, by the library itself."""
        vectors = self._library.encode([row[text] for row in rows]) if rows else []
        return {str(row["id"]): vector.tolist() for row, vector in zip(rows, vectors, strict=True)}

    def shows(self, rows: Sequence[Row]) -> None:
        """Assert that the view equals a fresh embedding of these rows."""
        seen, wanted = self.view(), self.fresh(rows)
        assert seen.keys() == wanted.keys()
        for key, vector in wanted.items():
            np.testing.assert_allclose(json.loads(seen[key]), vector, atol=1e-5)


def rows_of(count: int, about: str = "a mill") -> list[dict[str, Any]]:
    return [{"id": f"k{n}", "text": f"{about} of kind {n}", "lang": "en" if n % 2 else "de"} for n in range(count)]


@pytest.fixture
def static(engine: Engine, static_description: dict[str, Any]) -> None:
    with engine.begin() as connection:
        add_model(connection, "static", static_description)


@pytest.fixture(scope="module")
def library(static_model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(static_model), device="cpu")


@pytest.fixture
def make_tickets(
    engine: Engine, encoder: LocalEncoder, library: SentenceTransformer, static: None, tmp_path: Path
) -> Callable[..., Tickets]:
    return partial(Tickets, engine, encoder, library, tmp_path)


@pytest.fixture
def tickets(make_tickets: Callable[..., Tickets]) -> Tickets:
    return make_tickets(carry=["lang"])


def test_only_what_changed_is_embedded(tickets: Tickets) -> None:
    rows = rows_of(120)
    assert tickets.sync(rows) == {"in": 120, "embedded": 120}
    tickets.shows(rows)
    assert tickets.sync(rows) == {"in": 120, "unchanged": 120}
    changed = [{**rows[0], "text": "another mill"}, *rows[1:-2], {"id": "new", "text": "a new mill", "lang": "fr"}]
    assert tickets.sync(changed) == {"in": 119, "embedded": 2, "unchanged": 117, "removed": 2}
    tickets.shows(changed)
    assert tickets.view("lang")["new"] == "fr"


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


def drain_job(engine: Engine, job: UUID) -> None:
    """Cancel a failing job's pending chunks, as the dispatcher does."""
    with engine.begin() as connection:
        chunks.cancel_pending(connection, job, 0, 1_000)


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


def test_another_model_of_the_name_is_refused(tickets: Tickets) -> None:
    tickets.sync(rows_of(10))
    run_sql(tickets.engine, "update vectormill.models set weights_sha256 = 'others' where name = 'static'")
    with pytest.raises(UserError, match="isn't what it was"):
        tickets.submit(rows_of(11))


def test_a_long_end_holds_no_duty_up(tickets: Tickets) -> None:
    rows = rows_of(10)
    job = tickets.submit(rows)
    tickets.embed(job)
    with tickets.engine.begin() as other:
        jobs.lock(other, job)
        completion.end(tickets.engine, job, finalized="")
    tickets.end(job)
    tickets.shows(rows)


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
