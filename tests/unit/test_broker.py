"""Names of tasks, as Flower shows them."""

from uuid import uuid4

import pytest

from pipeline import broker
from pipeline.broker import ChunkMessage, Publisher


@pytest.fixture
def publisher() -> Publisher:
    return Publisher("redis://127.0.0.1:1/0")  # which isn't asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(broker, "monotonic", lambda: now[0])
    return now


def name_of(publisher: Publisher, job: str) -> str:
    made = ChunkMessage(job_id=uuid4(), chunk_id=1, job=job, model="mini lm", ordinal=0, chunks=1, items=1)
    return publisher._name_of(made)


def test_a_name_tells_job_and_model_without_blanks(publisher: Publisher) -> None:
    assert name_of(publisher, "docs nightly\n") == "docs-nightly-:mini-lm"


def test_past_the_most_names_the_one_that_is_unused_for_a_day_goes(publisher: Publisher, clock: list[float]) -> None:
    named = [name_of(publisher, f"job-{n}") for n in range(200)]
    assert len(set(named)) == 200
    assert name_of(publisher, "one-more") == "other-jobs:mini-lm"
    clock[0] = 86_399.0
    assert name_of(publisher, "job-0") == "job-0:mini-lm"
    clock[0] = 86_400.0
    assert name_of(publisher, "one-more") == "one-more:mini-lm"
    assert name_of(publisher, "job-0") == "job-0:mini-lm", "it was used since"
    assert len(publisher._names) == 200
    clock[0] = 86_401.0
    assert [name_of(publisher, f"new-{n}") for n in range(199)].count("other-jobs:mini-lm") == 1
