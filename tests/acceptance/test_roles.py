"""Whole jobs by processes that each log in with a role of their own: none lacks a right that it needs."""

import base64
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2 as httpx
import polars as pl
import pytest

from pipeline.catalog import keys, models
from pipeline.embedded.runtime import Running
from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.support.models import described, static_folder
from tests.support.ports import free_port
from tests.support.receiver import receiving
from tests.support.roles import logins
from tests.support.scripted_gateway import ScriptedGateway, error, good, scripted_gateway

_SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()


class Installation:
    """Installation whose processes have logins of their own, and a client of its api."""

    def __init__(self, fleet: Fleet, urls: dict[str, str], folder: Path) -> None:
        self.fleet, self.urls, self.folder = fleet, urls, folder
        self.url = f"http://127.0.0.1:{free_port()}"
        with fleet.engine.begin() as connection:
            token = keys.create(connection, models.workspace_id(connection), "me", admin=True).token
        self.client = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {token}"}, timeout=60)

    def start(self) -> None:
        """Start one process of each kind, and wait until all serve."""
        urls, start = {each: {"VECTORMILL_DATABASE_URL": url} for each, url in self.urls.items()}, self.fleet.start
        port = self.url.rpartition(":")[2]
        start("dispatcher", "pipeline.cli", "dispatcher", VECTORMILL_SQL_URL=self.urls["reader"], **urls["dispatcher"])
        start("engine", "pipeline.cli", "engine", "--device", "cpu", "--model", "static", **urls["engine"])
        start("api", "pipeline.cli", "api", "--port", port, **urls["api"])
        self.fleet.start_worker(2, **urls["worker"])
        led = "select count(*) from vectormill.leases where lease_until > now()"
        eventually(lambda: self.fleet.scalar(led), "a dispatcher that leads")
        eventually(lambda: self.fleet.scalar("select count(*) from vectormill.engines"), "an engine")
        eventually(self._answers, "an api that answers")

    def _answers(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Ask all processes to end, and wait for that."""
        for process in self.fleet.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.fleet.processes.values():
            process.wait(60)

    def post(self, path: str, **what: Any) -> Any:
        """Send a POST request, which must succeed; return the answer's JSON."""
        answer = self.client.post(path, **what)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def get(self, path: str) -> Any:
        """Send a GET request, which must succeed; return the answer's JSON or text."""
        answer = self.client.get(path)
        assert answer.is_success, answer.text
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    def submit(self, corpus: Path, model: str = "static", **fields: Any) -> UUID:
        """Submit a job by uploading its corpus; return the job's id."""
        upload = {"file": (corpus.name, corpus.read_bytes())}
        made = self.post("/api/jobs", data={"model": model, **fields}, files=upload)
        return UUID(made["id"])

    def read(self, *arguments: str) -> Any:
        """Run a command with the reader's login; return its JSON output."""
        kept = self.fleet.environment["VECTORMILL_DATABASE_URL"]
        self.fleet.environment["VECTORMILL_DATABASE_URL"] = self.urls["reader"]
        try:
            return json.loads(self.fleet.cli(*arguments, "--json").stdout)
        finally:
            self.fleet.environment["VECTORMILL_DATABASE_URL"] = kept


@pytest.fixture
def installation(fleet: Fleet, database: str, servers: Running, tmp_path: Path) -> Iterator[Installation]:
    """Yield an installation. Afterwards, check in the logs of Postgres and all processes that no right was missing."""
    log = servers.home / "logs" / "postgres.log"
    since = log.stat().st_size
    (tmp_path / "data").mkdir()
    (tmp_path / "files").mkdir()
    fleet.environment |= {
        "VECTORMILL_API_SOURCES": str(tmp_path / "data"),
        "VECTORMILL_API_OUTPUTS": str(tmp_path / "data"),
        "VECTORMILL_FILES": str(tmp_path / "files"),
        "VECTORMILL_WEBHOOK_SECRET": _SECRET,
        "FAR_KEY": "sk-roles",
    }
    made = Installation(fleet, logins(database), tmp_path / "data")
    with made.client:
        yield made
    made.stop()
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(since)
        refused = [line for line in file if "permission denied" in line or "must be owner" in line]
    for name in fleet.processes:
        said = (tmp_path / f"{name}.log").read_text(encoding="utf-8")
        refused += [line for line in said.splitlines() if "permission denied" in line or "InsufficientPriv" in line]
    assert refused == []


def test_all_that_jobs_go_through(installation: Installation, texts: list[str]) -> None:
    it, fleet = installation, installation.fleet
    corpus = write_corpus(it.folder / "corpus.jsonl", ["", *texts[:3_000]])
    with receiving() as receiver, scripted_gateway() as gateway:
        fleet.environment["VECTORMILL_WEBHOOKS"] = receiver.url
        where = ("--gateway", gateway.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
        fleet.cli("models", "add", "far", *where, "--request-inputs", "50")
        with fleet.engine.begin() as connection:
            models.add_model(connection, "small", described("static-64", static_folder(64)))
        it.start()
        _upload(it, corpus)
        receiver.wait_for(1)
        assert json.loads(receiver.got[0][2])["type"] == "job.completed"
        _files(it, corpus)
        _gateway(it, gateway, write_corpus(it.folder / "few.jsonl", texts[:20]))  # one chunk
    _sql(it)
    _collection(it)
    _batch_request(it)
    _keys_and_usage(it)
    _lost_claims(it, corpus)
    _somebody_looks(it)
    _a_reader_looks(it)
    fleet.cli("purge", "docs", "--yes")


def _ended(it: Installation, job: UUID, state: str = "completed") -> dict[str, Any]:
    ended = it.fleet.await_end(job)
    assert ended["state"] == state, ended
    receipt = it.get(f"/api/jobs/{job}/receipt?verify=true")
    assert receipt["balanced"]
    assert receipt["verified"]
    return ended


def _upload(it: Installation, corpus: Path) -> None:
    job = it.submit(corpus, name="docs", webhook=it.fleet.environment["VECTORMILL_WEBHOOKS"])
    assert _ended(it, job)["items"]["rejected"] == 1
    it.get(f"/api/jobs/{job}/results?limit=10")
    assert len(it.get(f"/api/jobs/{job}/rejects")["data"]) == 1
    it.get(f"/api/jobs/{job}/chunks")
    answer = it.post("/v1/embeddings", json={"model": "static", "input": "a mill"})
    assert len(answer["data"][0]["embedding"]) == 256


def _files(it: Installation, corpus: Path) -> None:
    wish = {"model": "static", "sources": [str(corpus)], "by_reference": True}
    carried = UUID(it.post("/api/jobs", json={**wish, "name": "carried", "carry": ["id"]})["id"])
    parquet = UUID(it.post("/api/jobs", json={**wish, "name": "parquet", "output": str(it.folder / "out")})["id"])
    _ended(it, carried)
    _ended(it, parquet)
    assert (it.folder / "out" / "_SUCCESS").exists()


def _gateway(it: Installation, gateway: ScriptedGateway, corpus: Path) -> None:
    text = json.loads(corpus.read_text().splitlines()[7])["text"]
    gateway.answer = lambda asked: error(400) if text in asked["input"] else good(asked)
    job = it.submit(corpus, "far", name="far", max_rejects="100%")
    assert _ended(it, job)["items"]["rejected"] == 1
    gateway.answer = lambda _: error(401)
    other = it.submit(corpus, "far", name="paused")
    eventually(lambda: it.fleet.status(other)["state"] == "paused", "a paused job")
    it.post(f"/api/jobs/{other}/priority", json={"priority": 3})
    gateway.answer = good
    it.post(f"/api/jobs/{other}/resume")
    _ended(it, other)
    assert it.post(f"/api/jobs/{job}/retry")["reopened_chunks"] == 1
    assert _ended(it, job)["items"]["rejected"] == 0


def _sql(it: Installation) -> None:
    query = "select n::text as id, ''text '' || n as text from generate_series(1, 10) n"
    job = it.fleet.scalar(f"select vectormill.submit('{query}', 'static')")
    eventually(lambda: it.fleet.scalar("select state = 'submitted' from vectormill.requests"), "a job of the request")
    _ended(it, job)
    # This request can't become a job, since its query has no such text column.
    refused = it.fleet.scalar(f"select vectormill.submit('{query}', 'static', name => 'refused', text_column => 'no')")
    eventually(lambda: it.get(f"/api/jobs/{refused}")["state"] == "failed", "a refused request")


def _collection(it: Installation) -> None:
    """Sync a collection over the api and in SQL, upgrade it, and drop it."""
    path = "/api/collections/tickets"
    places = [str(it.folder / name) for name in ("tickets", "small", "letters")]
    it.post("/api/collections", json={"name": "tickets", "model": "static", "output": places[0]})
    it.post(f"{path}/upgrade", json={"model": "small", "output": places[1]})
    rows = b"".join(json.dumps({"id": f"k{n}", "text": f"text {n}"}).encode() + b"\n" for n in range(100))
    _ended(it, UUID(it.post(f"{path}/syncs", files={"file": ("rows.jsonl", rows)})["id"]))
    eventually(lambda: it.get(path)["versions"][0]["differs"] is None, "both versions")
    query = "select ''k'' || n as id, ''text '' || n as text from generate_series(1, 95) n"
    job = it.fleet.scalar(f"select vectormill.sync('tickets', '{query}')")
    eventually(lambda: it.fleet.scalar("select count(*) from vectormill.syncs where job_id = :job", job=job), "a sync")
    _ended(it, job)
    eventually(lambda: it.get(path)["versions"][0]["differs"] is None, "both versions")
    assert it.get(f"{path}/comparison")["next_keys"] == 95
    it.post(f"{path}/search", json={"query": "text 7"})
    eventually(lambda: it.get(path)["output"]["version"] == 2, "files")
    files = it.folder / "forgotten.jsonl"
    files.write_text('{"id": "k7", "text": "a mill"}\n{"id": "k9", "text": "a mill"}\n')
    wish = {"model": "static", "sources": [str(files)], "by_reference": True, "max_rejects": "100%"}
    _ended(it, UUID(it.post("/api/jobs", json={**wish, "output": places[2]})["id"]))
    forgotten = it.post("/api/forgets", json={"keys": ["k7", "k8"]})["id"]
    eventually(lambda: it.get(f"/api/forgets/{forgotten}")["finished_at"], "forgotten keys")
    assert it.get(f"/api/forgets/{forgotten}")["collected"] == 4
    for place in places:
        assert "k7" not in pl.read_parquet(f"{place}/*.parquet")["key"]
    it.post(f"{path}/compact")
    eventually(lambda: not it.get(path)["output"]["behind"], "a full set")
    read = UUID(it.post("/api/jobs", json=wish)["id"])
    assert _ended(it, read)["items"]["rejected"] == 1
    assert it.post("/api/forgets/allow", json={"keys": ["k7", "k1"]}) == {"allowed": 1}
    it.post(f"{path}/swap", json={"keep_seconds": 0.001})
    it.read("collections", "show", "tickets")
    it.fleet.scalar("select count(*) from vectormill.tickets")
    assert it.client.delete(path).is_success


def _batch_request(it: Installation) -> None:
    body = {"model": "static", "input": "a mill"}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
    upload = {"file": ("lines.jsonl", json.dumps(line).encode())}
    file = it.post("/v1/files", data={"purpose": "batch"}, files=upload)["id"]
    wish = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = it.post("/v1/batches", json=wish)["id"]
    eventually(lambda: it.get(f"/v1/batches/{batch}")["status"] == "completed", "a completed batch request")
    it.get(f"/v1/files/{it.get(f'/v1/batches/{batch}')['output_file_id']}/content")
    stopped = it.post("/v1/batches", json=wish)["id"]
    it.client.post(f"/v1/batches/{stopped}/cancel")
    forgotten = it.post("/api/forgets", json={"keys": ["1"]})["id"]
    eventually(lambda: it.get(f"/api/forgets/{forgotten}")["finished_at"], "forgotten keys")
    assert it.client.get(f"/v1/files/{file}/content").content == b""
    assert it.client.delete(f"/v1/files/{file}").is_success


def _keys_and_usage(it: Installation) -> None:
    made = it.post("/api/keys", json={"name": "etl"})["id"]
    rotated = it.post(f"/api/keys/{made}/rotate", json={})["id"]
    assert it.client.delete(f"/api/keys/{rotated}").is_success
    assert it.get("/api/keys")
    for path in ("/api/usage", "/api/usage?by=key", "/api/workers", "/api/models", "/v1/models", "/metrics"):
        it.get(path)


def _lost_claims(it: Installation, corpus: Path) -> None:
    """Kill a child, freeze another until its lease is swept, and cancel the job."""
    job = it.submit(corpus, "minilm", name="struck")
    it.fleet.child_at_work(job)[0].kill()
    eventually(lambda: it.fleet.scalar("select count(*) from vectormill.claim_losses") == 1, "a freed claim")
    frozen, chunk, fence = it.fleet.child_at_work(job)
    frozen.suspend()
    query = "select fence > :fence from vectormill.chunks where id = :chunk"
    eventually(lambda: it.fleet.scalar(query, chunk=chunk, fence=fence), "another claim")
    frozen.resume()
    it.post(f"/api/jobs/{job}/pause")
    it.post(f"/api/jobs/{job}/resume")
    it.post(f"/api/jobs/{job}/cancel")
    _ended(it, job, "cancelled")


def _somebody_looks(it: Installation) -> None:
    """Log in to the dashboard, and visit each page."""
    key = it.client.headers["authorization"].removeprefix("Bearer ")
    with httpx.Client(base_url=it.url, cookies={"vectormill_key": key}, timeout=60) as browser:
        for path in ("/", "/jobs", "/jobs/struck", "/jobs/docs", "/collections", "/playground", "/submit", "/workers"):
            page = browser.get(path)
            assert page.status_code == 200, (path, page.text)
        assert "1 claim lost" in browser.get("/jobs/struck").text


def _a_reader_looks(it: Installation) -> None:
    assert len(it.read("jobs")) >= 5
    assert it.read("status", "docs")["state"] == "completed"
    assert it.read("receipt", "docs", "--verify")["verified"]
    it.read("rejects", "docs")


def test_a_right_that_a_worker_lacks_pauses_the_job(
    fleet: Fleet, database: str, texts: list[str], tmp_path: Path
) -> None:
    """A right is missing, as after an upgrade without roles.sql."""
    urls = logins(database)
    with fleet.engine.begin() as connection:
        connection.exec_driver_sql("revoke insert on vectormill.usage from vectormill_worker")
    fleet.start_dispatcher()
    fleet.start_worker(1, VECTORMILL_DATABASE_URL=urls["worker"])
    job = fleet.submit(str(write_corpus(tmp_path / "corpus.jsonl", texts[:300])), "--model", "static")
    eventually(lambda: fleet.status(job)["state"] == "paused", "a job that is paused")
    status = fleet.status(job)
    assert status["reason"] == "workers_failing"
    assert "permission denied for table usage" in fleet.scalar("select message from vectormill.jobs")
    logins(database)
    fleet.cli("resume", str(job))
    assert fleet.await_end(job)["items"]["embedded"] == 300
