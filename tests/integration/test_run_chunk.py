"""Run of a chunk on a real Postgres, with a real model."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.core.chunks import Claim
from pipeline.core.errors import LeaseLost, ModelError
from pipeline.core.models import Model
from pipeline.jobs import control
from tests.support.jobs_made import chunk_rows, make_job, run_sql, taken
from workers.encoders.batching import CONVICTED
from workers.encoders.local import LocalEncoder
from workers.runner.run_chunk import run_chunk
from workers.watchdog import Watch


@pytest.fixture(scope="module")
def encoder(static_model: Path, static_description: dict[str, Any]) -> LocalEncoder:
    made = LocalEncoder(static_model, "cpu")
    made.prove(bytes.fromhex(static_description["canary"]))
    return made


@pytest.fixture
def model(engine: Engine, static_description: dict[str, Any]) -> Model:
    with engine.begin() as connection:
        add_model(connection, "static", static_description)
        return find_model(connection, workspace_id(connection), "static")


def watch(most_seconds: float = 60) -> Watch:
    return Watch(hung_after_seconds=60, most_seconds=most_seconds)


def run(engine: Engine, encoder: LocalEncoder, claim: Claim, how: Watch | None = None) -> dict[str, Any]:
    run_chunk(engine, encoder, claim, how or watch(), on_hang=lambda: None)
    names = ("state", "embedded", "rejected", "cancelled", "isolation", "crashes")
    (row,) = [row for row in chunk_rows(engine, claim.job_id) if row["id"] == claim.chunk_id]
    return {name: row[name] for name in names}


def isolated(engine: Engine, model: Model, items: int, level: int) -> Claim:
    """Claim a chunk whose workers have died before."""
    job = make_job(engine, model, items, per_chunk=items)
    run_sql(engine, "update vectormill.chunks set isolation = :level, crashes = 1", level=level)
    return taken(engine, job)


def test_a_chunk_is_embedded_and_done(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    found = run(engine, encoder, taken(engine, make_job(engine, model, 8)))
    assert (found["state"], found["embedded"]) == ("done", 4)
    tokens = run_sql(engine, "select sum(tokens), min(vector_dims(vector)) from vectormill.embeddings")
    assert tokens == run_sql(engine, "select sum(prompt_tokens), 256 from vectormill.usage")


def test_a_cancelled_chunk_keeps_what_is_finished(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = isolated(engine, model, 200, 2)
    how = watch()
    how.cancelled = True
    with engine.begin() as connection:
        control.cancel(connection, claim.job_id)
    found = run(engine, encoder, claim, how)
    assert (found["state"], found["embedded"], found["cancelled"]) == ("cancelled", 8, 192)


def test_a_renewal_without_a_row_is_a_lost_lease_and_no_cancellation(
    engine: Engine, encoder: LocalEncoder, model: Model
) -> None:
    """After a failover, another claim has the same fence. Nothing of that claim is touched."""
    claim = isolated(engine, model, 200, 2)
    run_sql(engine, "update vectormill.chunks set token = gen_random_uuid()")
    before = chunk_rows(engine, claim.job_id)
    how = watch()
    how.lost = True
    with pytest.raises(LeaseLost):
        run(engine, encoder, claim, how)
    assert chunk_rows(engine, claim.job_id) == before


def test_a_chunk_past_its_time_is_given_back_without_a_crash(
    engine: Engine, encoder: LocalEncoder, model: Model
) -> None:
    found = run(engine, encoder, isolated(engine, model, 200, 2), watch(most_seconds=0))
    assert (found["state"], found["embedded"], found["crashes"]) == ("pending", 8, 0)


def test_a_chunk_that_was_read_slowly_has_all_its_time_yet(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    how = watch(most_seconds=60)
    how.began -= 61  # spent on unpacking, before the first block
    assert run(engine, encoder, isolated(engine, model, 200, 2), how)["state"] == "done"


@pytest.mark.parametrize("items", [1, 2, 100])
def test_a_convicted_item_is_rejected_and_the_rest_done(
    engine: Engine, encoder: LocalEncoder, model: Model, items: int
) -> None:
    found = run(engine, encoder, isolated(engine, model, items, CONVICTED))
    assert (found["state"], found["embedded"], found["rejected"]) == ("done", items - 1, 1)
    assert run_sql(engine, "select index, code from vectormill.rejects") == [(0, "crashed_worker")]


def test_isolated_slices_are_committed_one_by_one(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    assert run(engine, encoder, isolated(engine, model, 100, 2))["state"] == "done"
    assert run_sql(engine, "select part, items from vectormill.usage order by part") == [
        *((part, 8) for part in range(8)),
        (8, 36),
    ]


def test_long_texts_can_be_rejected(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    job = make_job(engine, model, 4, options={"on_long": "reject", "max_item_tokens": 2})
    run_sql(engine, "update vectormill.vector_spaces set max_item_tokens = 2")
    run_sql(engine, "update vectormill.items set text = 'one two three four' where index = 1")
    found = run(engine, encoder, taken(engine, job))
    assert (found["embedded"], found["rejected"]) == (3, 1)
    assert run_sql(engine, "select index, code, message from vectormill.rejects") == [
        (1, "too_long", "more than 2 tokens")
    ]


def test_a_text_without_a_vector_is_rejected(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    """A static model has no token for a blank text, and makes a zero vector of it."""
    job = make_job(engine, model, 4)
    run_sql(engine, "update vectormill.items set text = '   ' where index = 2")
    found = run(engine, encoder, taken(engine, job))
    assert (found["state"], found["embedded"], found["rejected"]) == ("done", 3, 1)
    assert run_sql(engine, "select index, code from vectormill.rejects") == [(2, "bad_vector")]


def test_a_model_that_broke_writes_nothing(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad vectors with a bad canary are the device's fault, so no item is rejected."""
    forward = encoder._forward
    monkeypatch.setattr(encoder, "_forward", lambda ids: forward(ids) * float("nan"))
    claim = taken(engine, make_job(engine, model, 4))
    with pytest.raises(ModelError, match="canary"):
        run(engine, encoder, claim)
    assert run_sql(engine, "select count(*) from vectormill.rejects") == [(0,)]
    assert run_sql(engine, "select count(*) from vectormill.embeddings") == [(0,)]


def test_what_fails_within_a_chunk_is_not_committed_before_the_canary_is_asked(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost device makes each text fail alone, while parts of the chunk are committed."""
    forward, ran = encoder._forward, []

    def lost_after_one(ids: list[list[int]]) -> Any:
        ran.append(len(ids))
        if len(ran) > 1:
            raise RuntimeError("the device is lost")
        return forward(ids)

    monkeypatch.setattr(encoder, "_forward", lost_after_one)
    monkeypatch.setattr(encoder, "budget_tokens", 8)
    how = watch()
    how.commit_seconds = 0.0
    claim = taken(engine, make_job(engine, model, 40, per_chunk=40))
    with pytest.raises(ModelError):
        run(engine, encoder, claim, how)
    assert run_sql(engine, "select count(*) from vectormill.rejects") == [(0,)]
    assert run_sql(engine, "select count(*) from vectormill.embeddings") == [(ran[0],)]
