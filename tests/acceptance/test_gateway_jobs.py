"""Jobs through an upstream, mostly our own api: whatever happens to it, the vectors are those of the local model."""

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx2 as httpx
import pytest
from sqlalchemy import text

from pipeline.catalog import keys, models
from pipeline.db import workspaces
from pipeline.jobs import status
from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.acceptance.oracle import objections
from tests.support.ports import free_port
from tests.support.scripted_gateway import good, scripted_gateway

#: Requests per minute that the upstream allows.
_A_MINUTE = 900


@dataclass
class Far:
    """Model `far`, which is `static` behind our own api, in a workspace with limits."""

    fleet: Fleet
    url: str
    key_file: Path

    def start_api(self) -> None:
        """Start the api, and wait until it answers."""
        self.fleet.start("api", "pipeline.cli", "api", "--port", self.url.rsplit(":", 1)[1])
        eventually(self._answers, "an api that answers")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def new_key(self) -> str:
        """Create a key of the limited workspace, and give it to the workers. Return its id."""
        with self.fleet.engine.begin() as connection:
            made = keys.create(connection, models.workspace_id(connection, "limited"), "worker")
        self.key_file.write_text(made.token + "\n")
        return made.id

    def embedded(self, job: UUID) -> int:
        """Return the number of the job's embedded items."""
        with self.fleet.engine.begin() as connection:
            return status.sum_up(connection, job).items.embedded


@pytest.fixture
def far(fleet: Fleet, tmp_path: Path) -> Far:
    made = Far(fleet, f"http://127.0.0.1:{free_port()}", tmp_path / "far.key")
    fleet.environment["FAR_KEY_FILE"] = str(made.key_file)
    with fleet.engine.begin() as connection:
        workspace = workspaces.create(connection, "limited", 1.0)
        assert workspace
        workspaces.enable_models(connection, workspace, ["static"])
        workspaces.set_limits(connection, workspace, {"requests_per_minute": _A_MINUTE})
    fleet.start("engine", "workers.engine.server", VECTORMILL_WORKER_MODELS="static")
    made.start_api()
    eventually(lambda: fleet.scalar("select count(*) from vectormill.engines"), "an engine")
    return made


def _add(far: Far, *arguments: str) -> None:
    where = ("--gateway", far.url, "--upstream-model", "static", "--key-env", "FAR_KEY")
    far.fleet.cli("models", "add", "far", *where, *arguments)


def test_a_server_that_dies_and_a_key_that_is_revoked(far: Far, texts: list[str], tmp_path: Path) -> None:
    fleet, corpus = far.fleet, write_corpus(tmp_path / "corpus.jsonl", texts[:5_000])
    key_id = far.new_key()
    _add(far, "--request-inputs", "20")
    fleet.start_dispatcher()
    fleet.start_worker(replicas=2)
    calm = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(calm)["state"] == "completed"

    job = fleet.submit(str(corpus), "--model", "far")
    eventually(lambda: far.embedded(job), "a commit through the upstream")
    fleet.kill("api")
    failures = "select count(*) from vectormill.attempts where status = 'no answer'"
    eventually(lambda: fleet.scalar(failures) >= 5, "requests that fail")
    before = far.embedded(job)
    far.start_api()
    eventually(lambda: far.embedded(job) > before, "a commit after the restart")

    with fleet.engine.begin() as connection:
        keys.revoke(connection, models.workspace_id(connection, "limited"), key_id)
    eventually(lambda: fleet.status(job)["state"] == "paused", "the job to pause")
    paused = fleet.status(job)
    assert paused["reason"] == "key_refused"
    assert "401" in paused["message"]
    assert "FAR_KEY" in paused["message"]
    other = fleet.submit(str(write_corpus(tmp_path / "other.jsonl", texts[:500])), "--model", "static")
    assert fleet.await_end(other)["state"] == "completed", "other jobs go on"
    assert fleet.status(job)["state"] == "paused"
    far.new_key()
    fleet.cli("resume", str(job))
    assert fleet.await_end(job)["state"] == "completed"

    with fleet.engine.begin() as connection:
        assert objections(connection, job, corpus, calm) == []
        tokens = status.receipt(connection, job).tokens
    assert tokens.billed >= tokens.prompt > 0
    assert fleet.scalar("select sum(crashes) from vectormill.chunks") == 0
    assert fleet.scalar("select count(*) from vectormill.claim_losses") == 0


def test_a_gateway_whose_weights_change_and_are_mended(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    fleet.environment["FAR_KEY"] = "sk-one"
    with scripted_gateway() as gateway:
        where = ("--gateway", gateway.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
        fleet.cli("models", "add", "changing", *where)
        fleet.start_dispatcher()
        fleet.start_worker(replicas=1)
        gateway.answer = lambda asked: good({**asked, "input": [text + "!" for text in asked["input"]]})
        corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
        job = fleet.submit(str(corpus), "--model", "changing")
        eventually(lambda: fleet.status(job)["state"] == "paused", "the job to pause")
        paused = fleet.status(job)
        assert paused["reason"] == "gateway_refused"
        assert "canary" in paused["message"]
        assert fleet.scalar("select count(*) from vectormill.embeddings") == 0
        gateway.answer = good
        fleet.cli("resume", str(job))
        assert fleet.await_end(job)["state"] == "completed", "by the same worker"
    with fleet.engine.begin() as connection:
        assert objections(connection, job, corpus) == []


@pytest.mark.alone
def test_hard_limits_are_used_up_and_hardly_ever_hit(far: Far, texts: list[str], tmp_path: Path) -> None:
    fleet, corpus = far.fleet, write_corpus(tmp_path / "corpus.jsonl", texts[:5_000])
    far.new_key()
    _add(far, "--request-inputs", "10")
    fleet.start_dispatcher()
    fleet.start_worker(replicas=8)
    job = fleet.submit(str(corpus), "--model", "far")
    assert fleet.await_end(job)["state"] == "completed"
    with fleet.engine.begin() as connection:
        row = connection.execute(
            text("""
                with times as (select min(started_at) as begin, max(finished_at) as "end" from vectormill.attempts)
                select extract(epoch from "end" - begin) as seconds, count(*) as attempts,
                       count(*) filter (where status = 'ok') as passed,
                       count(*) filter (where status = '429' and started_at > begin + interval '10 s') as refused
                from vectormill.attempts, times group by begin, "end"
            """)
        ).one()
        assert objections(connection, job, corpus) == []
    allowed = _A_MINUTE / 60 * float(row.seconds)
    print(f"{row.passed} of {allowed:.0f} allowed in {row.seconds:.1f} s; {row.refused} of {row.attempts} refused")
    assert row.passed >= 0.95 * allowed
    assert row.refused <= 0.02 * row.attempts
