"""Single faults, each with a job of its own that the oracle judges. Drills with many faults are in tests/chaos."""

from pathlib import Path

import pytest

from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually


@pytest.mark.parametrize(
    ("meanwhile", "fenced"),
    [
        ("redone", True),
        ("redone", False),
        ("cancelled", True),
        pytest.param("cancelled", False, marks=pytest.mark.nightly),
    ],
)
def test_a_worker_frozen_past_its_lease(
    fleet: Fleet, texts: list[str], tmp_path: Path, fenced: bool, meanwhile: str
) -> None:
    """With the fence the worker discards its work. Without it the oracle must object: this proves that it can."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    fleet.start_dispatcher()
    fleet.environment["MUTANT"] = "without_fence"
    fleet.start_worker(1, app="workers.runner.app" if fenced else "tests.acceptance.mutants", name="frozen")
    job = fleet.submit(str(corpus), "--model", "minilm")
    child, chunk, fence = fleet.child_at_work(job)
    child.suspend()
    second = None
    if meanwhile == "cancelled":
        fleet.cli("cancel", str(job))
        assert fleet.await_end(job)["state"] == "cancelled"
    else:
        # The second worker has claimed the chunk and is still running it when the first one wakes.
        fleet.start_worker(1, name="second")
        second, _, _ = fleet.child_at_work(job, chunk, after=fence)
        second.suspend()
    child.resume()
    log = fleet.logs / "frozen.log"
    wrote = "select exists (select from vectormill.usage where chunk_id = :chunk and fence = :fence)"
    eventually(
        lambda: "lease_lost" in log.read_text() or fleet.scalar(wrote, chunk=chunk, fence=fence),
        "what the frozen worker did when it woke",
    )
    if second:
        second.resume()
        fleet.await_end(job)
    said = fleet.objections(job, corpus)
    assert bool(said) is not fenced
    if meanwhile == "redone":
        assert any("the witness saw" in each for each in said) is not fenced


def test_two_jobs_on_two_models_one_cancelled_midway(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    fleet.start_dispatcher()
    fleet.start_worker()
    slow = fleet.submit(str(corpus), "--model", "minilm")
    other = fleet.submit(str(corpus), "--model", "static")
    eventually(lambda: fleet.status(slow)["items"]["embedded"] > 0, "the first vectors")
    fleet.cli("cancel", str(slow))
    ended, untouched = fleet.await_end(slow), fleet.await_end(other)
    assert ended["state"] == "cancelled"
    assert 0 < ended["items"]["embedded"] < len(texts)
    assert ended["items"]["embedded"] + ended["items"]["cancelled"] == len(texts)
    assert untouched["state"] == "completed"
    assert untouched["items"]["embedded"] == len(texts)
    assert fleet.objections(slow, corpus) == []
    assert fleet.objections(other, corpus) == []
