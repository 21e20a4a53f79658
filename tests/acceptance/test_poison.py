"""Harmful texts, each of which is rejected with its code, and nothing else is; and broken workers, for which no text is
blamed."""

import shutil
from os import SEEK_CUR, SEEK_END
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.acceptance.conftest import write_corpus
from tests.acceptance.counts import COUNTERS, counts_below, tokens_embedded
from tests.acceptance.fleet import Fleet, eventually
from tests.acceptance.poison import Poison
from tests.support.models import bundled_folder

#: Limit of a job: each lost process' successor has to load its libraries and its model again.
_SECONDS = 900.0
pytestmark = pytest.mark.timeout(1_200)


def _start_brittle(fleet: Fleet, mutant: str, replicas: int = 2) -> None:
    fleet.start_dispatcher()
    fleet.environment["MUTANT"] = mutant
    fleet.start_worker(replicas, app="tests.acceptance.mutants")


def _rejects(fleet: Fleet, job: UUID) -> dict[int, str]:
    with fleet.engine.begin() as connection:
        query = text("select index, code from vectormill.rejects where job_id = :job")
        return {row[0]: row[1] for row in connection.execute(query, {"job": job})}


def test_each_poison_is_rejected_and_nothing_else(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    """The poisons stand alone in a chunk, and several to a chunk, adjacent and apart."""
    chosen = texts[:1_500]
    poisons = {
        **dict(enumerate(Poison, 300)),
        430: Poison.MAKES_NAN,
        760: Poison.RAISES,
        1_499: Poison.MAKES_NAN,
    }
    for at, poison in poisons.items():
        chosen[at] = f"{poison}, please"
    corpus = write_corpus(tmp_path / "corpus.jsonl", chosen)
    _start_brittle(fleet, "poisonable")
    job = fleet.submit(str(corpus), "--model", "minilm")
    assert fleet.await_end(job, _SECONDS)["state"] == "completed"
    assert _rejects(fleet, job) == {at: poison.code for at, poison in poisons.items()}
    assert fleet.objections(job, corpus) == []


@pytest.mark.parametrize("count", [2_500, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_one_poison_among_thousands_costs_little(fleet: Fleet, texts: list[str], tmp_path: Path, count: int) -> None:
    """At the default size of chunks, no more tokens than those of 200 texts are embedded in vain: 2 % of 10,000."""
    chosen = [f"{texts[n % len(texts)]} {n}" for n in range(count)]
    chosen[1_321] = f"{Poison.KILLS} {chosen[1_321]}"
    corpus = write_corpus(tmp_path / "corpus.jsonl", chosen)
    del fleet.environment["VECTORMILL_CHUNK_ITEMS"]
    fleet.environment["PROMETHEUS_MULTIPROC_DIR"] = counts_below(tmp_path)
    _start_brittle(fleet, "poisonable")
    job = fleet.submit(str(corpus), "--model", "minilm")
    assert fleet.await_end(job, _SECONDS)["state"] == "completed"
    assert _rejects(fleet, job) == {1_321: "crashed_worker"}
    committed = fleet.scalar("select sum(prompt_tokens) from vectormill.usage where job_id = :job", job=job)
    assert 1 <= tokens_embedded(tmp_path.glob(COUNTERS)) / float(committed) <= 1 + 200 / count


def test_a_driver_that_kills_pauses_its_jobs_and_blames_no_text(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    _start_brittle(fleet, "dying_at_load", replicas=1)
    job = fleet.submit(str(corpus), "--model", "static")
    eventually(lambda: fleet.status(job)["state"] == "paused", "a job that is paused")
    assert fleet.status(job)["reason"] == "workers_failing"
    crashes = "select max(crashes) from vectormill.chunks where job_id = :job"
    assert (_rejects(fleet, job), fleet.scalar(crashes, job=job)) == ({}, 0)
    fleet.kill_tree("worker")
    fleet.start_worker(1, name="mended")
    fleet.cli("resume", str(job))
    assert fleet.await_end(job, _SECONDS)["items"]["embedded"] == 1_000
    assert fleet.objections(job, corpus) == []


def test_a_process_that_loses_its_device_blames_no_text(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    _start_brittle(fleet, "losing_the_device")
    job = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(job, _SECONDS)["items"]["embedded"] == 1_000
    assert fleet.objections(job, corpus) == []
    lost = "select count(*) from vectormill.claim_losses where cause = 'model stopped'"
    assert fleet.scalar(lost) > 0


def test_weights_that_were_changed_pause_the_job_and_blame_no_text(
    fleet: Fleet, texts: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundled_folder(), tmp_path / "model")
    fleet.cli("models", "add", "ours", "--path", str(folder))
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:2_000])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "ours")
    child, _, _ = fleet.child_at_work(job)
    _flip_a_byte(folder / "model.safetensors")
    child.kill()
    eventually(lambda: fleet.status(job)["state"] == "paused", "a job that is paused")
    assert fleet.status(job)["reason"] == "workers_failing"
    _flip_a_byte(folder / "model.safetensors")
    fleet.kill_tree("worker")
    fleet.start_worker(1, name="mended")
    fleet.cli("resume", str(job))
    assert fleet.await_end(job, _SECONDS)["items"]["embedded"] == 2_000
    assert fleet.objections(job, corpus) == []


def _flip_a_byte(file: Path) -> None:
    with file.open("r+b") as weights:
        weights.seek(-1_000, SEEK_END)
        byte = weights.read(1)[0]
        weights.seek(-1, SEEK_CUR)
        weights.write(bytes([byte ^ 1]))
