"""Predictions of `vectormill submit --dry-run` against the jobs themselves, by a fleet of real processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet

_DISK = """
    select (sum(pg_total_relation_size(relid)))::float8 from (
      select relid from pg_partition_tree('vectormill.items') where isleaf
      union all select relid from pg_partition_tree('vectormill.embeddings') where isleaf) leaves
"""
_WAL = "select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::float8"
_SLOWER = "update vectormill.chunks set started_at = started_at - interval '10 s' where job_id = :job returning 1"
_SLOT_SECONDS = """
    select sum(extract(epoch from finished_at - started_at))::float8 from vectormill.chunks where job_id = :job
"""


@pytest.mark.alone
def test_a_dry_run_tells_what_the_job_then_takes(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    """Size is predicted within a fifth. Time depends on what else the machine does, so `tests.benchmarks.dry_run` holds
    it to a fifth."""
    fleet.start_dispatcher()
    fleet.start_worker(VECTORMILL_CHUNK_ITEMS="10000")
    many = [f"{number}: {text}" for number in range(8) for text in texts]
    corpus = write_corpus(tmp_path / "corpus.jsonl", many)
    job = ("--model", "static", "--name", "docs")

    def predict(*options: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            fleet.cli("submit", str(corpus), *job, "--dry-run", "--json", *options).stdout
        )
        return found

    before = predict()
    assert fleet.scalar("select count(*) from vectormill.jobs") == 0
    assert fleet.scalar("select count(*) from pg_class where relname like 'dry_run%'") == 0
    disk, wal = fleet.scalar(_DISK), fleet.scalar(_WAL)
    done = fleet.submit(str(corpus), *job)
    assert fleet.await_end(done)["state"] == "completed"
    assert before["time"]["measured"] == "here"
    assert before["items"] == {"total": len(many), "rejected": 0}
    assert before["pieces"]["disk_bytes"] == pytest.approx(fleet.scalar(_DISK) - disk, rel=0.2)
    assert before["pieces"]["wal_bytes"] == pytest.approx(fleet.scalar(_WAL) - wal, rel=0.2)

    # The job's own work tells the next one's rates, if it took long enough: here as long as on a slow machine.
    fleet.scalar(_SLOWER, job=done)
    after, scaled = predict(), predict("--at", "80000")
    assert after["time"]["measured"] == scaled["time"]["measured"] == "workers"
    for piece in ("wal_bytes", "disk_bytes"):
        assert scaled["pieces"][piece] == pytest.approx(before["pieces"][piece] * 80_000 / len(many), rel=0.1)
    # Both slots work on it, and the last chunks decide when it ends.
    slot_seconds = fleet.scalar(_SLOT_SECONDS, job=done)
    for found, items in ((after, len(many)), (scaled, 80_000)):
        working = found["pieces"]["embed_seconds"] + found["pieces"]["write_seconds"]
        assert slot_seconds / len(many) * items / 2 < working < slot_seconds / len(many) * items
