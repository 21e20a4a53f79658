"""Run of a chunk on a real Postgres, with a real model."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.chunk_io import reader
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import Claim
from pipeline.core.errors import LeaseLost, ModelError
from pipeline.core.models import Model
from pipeline.jobs import control
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import chunk_rows, make_job, run_sql, taken
from workers.encoders.batching import CONVICTED, Batch, Encoder, Span, SplitRule, Tokenised
from workers.encoders.local import LocalEncoder
from workers.encoders.reading import Ids
from workers.runner import run_chunk as run_chunk_module
from workers.runner.run_chunk import run_chunk
from workers.watchdog import Watch


@pytest.fixture
def model(engine: Engine, static_description: dict[str, Any]) -> Model:
    with engine.begin() as connection:
        add_model(connection, "static", static_description)
        return find_model(connection, workspace_id(connection), "static")


def watch(most_seconds: float = 60) -> Watch:
    return Watch(hung_after_seconds=60, most_seconds=most_seconds)


def run(engine: Engine, encoder: Encoder, claim: Claim, how: Watch | None = None) -> dict[str, Any]:
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
    devices = run_sql(engine, "select distinct device, precision from vectormill.usage")
    assert devices == [(encoder.device_kind, encoder.precision)] == [("cpu", "float32")]


def test_a_cancelled_chunk_keeps_what_is_finished(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = isolated(engine, model, 200, 2)
    how = watch()
    how.cancelled = True
    with engine.begin() as connection:
        control.cancel(connection, claim.job_id)
    found = run(engine, encoder, claim, how)
    assert (found["state"], found["embedded"], found["cancelled"]) == ("cancelled", 8, 192)


def test_what_became_of_a_chunk_is_told(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    tally = run_chunk(engine, encoder, taken(engine, make_job(engine, model, 8)), watch(), on_hang=lambda: None)
    assert re.fullmatch(r"4 embedded, \d+ tokens, 0\.\d s", str(tally))
    assert tally.given_back is None
    (counted,) = run_sql(engine, "select sum(prompt_tokens) from vectormill.usage")[0]
    assert tally.tokens == counted
    claim, how = isolated(engine, model, 200, 2), watch()
    how.cancelled = True
    with engine.begin() as connection:
        control.cancel(connection, claim.job_id)
    tally = run_chunk(engine, encoder, claim, how, on_hang=lambda: None)
    assert (tally.embedded, tally.given_back, tally.cancelled) == (8, None, True)
    assert str(tally).endswith(" s, the rest was cancelled")
    tally = run_chunk(engine, encoder, isolated(engine, model, 200, 2), watch(-1), on_hang=lambda: None)
    assert (tally.embedded, tally.given_back) == (8, "its time is up")


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

    def lost_after_one(ids: list[Ids]) -> Any:
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


def test_a_refusal_while_items_are_read_is_the_databases(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    """Then the chunk is given back. Any other error would end the process, and be taken for a text's fault."""
    claim = taken(engine, make_job(engine, model, 4))
    run_sql(engine, "alter table vectormill.items rename column text to body")
    with pytest.raises(DBAPIError):
        run(engine, encoder, claim)


def test_what_truncation_loses_is_counted(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    job = make_job(engine, model, 4, options={"max_item_tokens": 2})
    run_sql(engine, "update vectormill.vector_spaces set max_item_tokens = 2")
    run_sql(engine, "update vectormill.items set text = 'one two three four' where index = 1")
    run_sql(engine, "update vectormill.items set text = repeat('one two ', 1000) where index = 2")
    run(engine, encoder, taken(engine, job))
    ((lost, most),) = run_sql(engine, "select lost_tokens, most_truncated from vectormill.chunks")
    assert [each["index"] for each in most] == [2, 1]
    assert most[1] == {"index": 1, "key": "k1", "lost_tokens": 2}
    assert most[0]["lost_tokens"] == pytest.approx(1_998, rel=0.1)
    assert lost == sum(each["lost_tokens"] for each in most)


# Overlap


class Noting:
    """Encoder that notes its steps, and lets a test hold them up."""

    def __init__(self, encoder: LocalEncoder, steps: list[str]) -> None:
        self._encoder, self._steps, self.dimensions = encoder, steps, encoder.dimensions
        self.device_kind, self.precision = encoder.device_kind, encoder.precision
        self.before: dict[str, Callable[[], object]] = {}

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokenised:
        self._note("tokenise")
        return self._encoder.tokenise(texts, max_tokens)

    def split(
        self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule, beat: Callable[[], None] = lambda: None
    ) -> list[list[Span]]:
        return self._encoder.split(texts, titles, rule, beat)

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        self._note("embed")
        yield from self._encoder.batches(tokenised, stop)

    def prove_again(self) -> None:
        self._encoder.prove_again()

    def _note(self, step: str) -> None:
        name = f"{step} {sum(each.startswith(step) for each in self._steps)}"
        self._steps.append(name)
        self.before.get(name, lambda: None)()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of a chunk whose blocks are single texts."""
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1)
    return []


def noting_writes(monkeypatch: pytest.MonkeyPatch, steps: list[str], before: Callable[[int], object]) -> None:
    def write(engine: Engine, claim: Claim, number: int, *rest: Any) -> None:
        before(number)
        write_chunk(engine, claim, number, *rest)
        steps.append(f"written {number}")

    monkeypatch.setattr(run_chunk_module, "write_chunk", write)


def test_a_block_is_tokenised_and_another_written_while_one_is_embedded(
    engine: Engine, encoder: LocalEncoder, model: Model, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised, embedding = threading.Event(), threading.Event()
    noting = Noting(encoder, steps)
    noting.before = {
        "tokenise 1": tokenised.set,
        "embed 0": lambda: assert_set(tokenised),
        "embed 1": embedding.set,
    }
    noting_writes(monkeypatch, steps, lambda number: assert_set(embedding) if number == 0 else None)
    claim = taken(engine, make_job(engine, model, 4, per_chunk=4))
    found = run(engine, noting, claim)
    assert (found["state"], found["embedded"]) == ("done", 4)
    assert [step for step in steps if step.startswith("written")] == [f"written {number}" for number in range(4)]


def assert_set(event: threading.Event) -> None:
    assert event.wait(60), "the other step hasn't begun"


def test_in_a_search_each_step_waits_for_the_one_before(
    engine: Engine, encoder: LocalEncoder, model: Model, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noting_writes(monkeypatch, steps, lambda number: None)
    found = run(engine, Noting(encoder, steps), isolated(engine, model, 3, 1))
    assert (found["state"], found["embedded"]) == ("done", 3)
    assert steps == [f"{step} {number}" for number in range(3) for step in ("tokenise", "embed", "written")]


def test_a_commit_that_fails_ends_the_claim(
    engine: Engine, encoder: LocalEncoder, model: Model, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = watch()

    def overtake(number: int) -> None:
        if number == 1:
            run_sql(engine, "update vectormill.chunks set token = gen_random_uuid()")

    noting = Noting(encoder, steps)
    noting.before = {"embed 2": lambda: eventually(lambda: how.failed or None, "the failure")}
    noting_writes(monkeypatch, steps, overtake)
    claim = taken(engine, make_job(engine, model, 20, per_chunk=20))
    with pytest.raises(LeaseLost):
        run(engine, noting, claim, how)
    assert run_sql(engine, "select items from vectormill.usage") == [(1,)]
    assert "embed 3" not in steps


def test_each_thread_has_its_own_batch_clock() -> None:
    how = Watch(hung_after_seconds=-1, most_seconds=60)  # hung at once, unless all rest
    with ThreadPoolExecutor(1) as other:
        other.submit(how.beat).result()
        how.beat()
        how.rest()
        assert how.hung
        other.submit(how.rest).result()
    assert not how.hung
