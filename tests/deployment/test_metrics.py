"""Metrics of real processes after real jobs; neither they nor any log hold a text or a key."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2 as httpx
import psutil
import psycopg
import pytest
import redis
from sqlalchemy import Engine, text

from pipeline.catalog import keys, models
from pipeline.core.options import JobOptions
from pipeline.db import workspaces
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from pipeline.infra import metrics
from pipeline.ingest.collections import create_collection
from pipeline.jobs import status
from tests.acceptance.fleet import Fleet, eventually
from tests.conftest import new_database
from tests.support.ports import free_port
from tests.support.scraping import ADDED, Sample, asked_for, dashboard_queries, rule_queries, scrape, series, total
from tests.support.scripted_gateway import ScriptedGateway, error, good, scripted_gateway

_TEXT, _KEY, _SECRET, _WORKSPACE = "unmistakable text", "unmistakable-key", "unmistakable-secret", "unmistakable-place"
_TEXTS, _FAR_TEXTS, _WITHOUT = 400, 30, 3


@dataclass
class Watched:
    """Fleet after its jobs, and the URL of each process' metrics."""

    fleet: Fleet
    engine: Engine
    urls: dict[str, str]
    jobs: dict[str, UUID]
    flower_url: str
    #: All API keys that were used, refused ones included.
    tokens: list[str]

    def scrape(self, process: str) -> list[Sample]:
        """Return the metrics that a process shows now."""
        return scrape(self.urls[process])

    def flower(self, page: str) -> httpx.Response:
        """Return a page of Flower."""
        reply = httpx.get(f"{self.flower_url}{page}", auth=("vectormill", "sesame"), timeout=30)
        assert reply.status_code == 200, page
        return reply

    def receipt(self, job: str) -> dict[str, Any]:
        """Return a job's receipt."""
        with self.engine.begin() as connection:
            return status.receipt(connection, self.jobs[job]).model_dump(by_alias=True)


@pytest.fixture(scope="module")
def watched(
    servers: Running,
    static_description: dict[str, Any],
    bundled_description: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    redis_url = servers.redis_url.rsplit("/", 1)[0] + "/3"
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    with new_database(servers.database_url) as url, scripted_gateway() as far:
        engine = make_engine(url, application="vectormill-tests", pool_size=4)
        with engine.begin() as connection:
            models.add_model(connection, "static", static_description)
            models.add_model(connection, "minilm", bundled_description)
            create_collection(
                connection,
                models.workspace_id(connection),
                "watched",
                model="static",
                options=JobOptions(),
                expect_every=timedelta(days=1),
            )
        environment = {
            "VECTORMILL_DATABASE_URL": url,
            "VECTORMILL_REDIS_URL": redis_url,
            "VECTORMILL_CHUNK_ITEMS": "100",
            "VECTORMILL_CHUNK_SECONDS": "0.5",
            "HF_HUB_OFFLINE": "1",
            "FAR_KEY": _SECRET,
        }
        fleet = Fleet(engine=engine, environment=environment, logs=folder)
        try:
            found = _started(fleet, engine)
            _do_jobs(found, far, folder)
            _ask_gateway(found)
            yield found
        finally:
            fleet.close()
            engine.dispose()


def _started(fleet: Fleet, engine: Engine) -> Watched:
    ports = {name: free_port() for name in ("dispatcher", "worker", "engine", "api", "flower")}
    for name in ("dispatcher", "worker"):
        more = ("--devices", "cpu", "--replicas", "2") if name == "worker" else ()
        fleet.start(name, "pipeline.cli", name, *more, VECTORMILL_METRICS_PORT=str(ports[name]))
    fleet.start("engine", "workers.engine.server", VECTORMILL_ENGINE_PORT=str(ports["engine"]))
    fleet.start("api", "pipeline.cli", "api", "--port", str(ports["api"]))
    fleet.start(
        "flower",
        *("pipeline.cli", "flower"),
        VECTORMILL_FLOWER_PORT=str(ports["flower"]),
        VECTORMILL_FLOWER_PASSWORD="sesame",
    )
    flower_url = f"http://127.0.0.1:{ports['flower']}"
    urls = {process.name: f"http://127.0.0.1:{ports[process.name]}/metrics" for process in metrics.PROCESSES}
    for url in (*urls.values(), f"{flower_url}/healthcheck"):
        eventually(lambda url=url: _answers(url), f"an answer of {url}")  # type: ignore[misc]
    eventually(lambda: fleet.scalar("select count(*) from vectormill.workers"), "a worker")
    return Watched(fleet, engine, urls, {}, flower_url, [])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _corpus(file: Path, count: int, without: int = 0) -> str:
    """Write a file of `count` texts, and of `without` rows that have none; return its path."""
    rows = [{"id": f"{_KEY}-{n}", "text": f"{_TEXT}, " + "again " * (n % 40)} for n in range(count)]
    rows += [{"id": f"{_KEY}-without-{n}", "text": None} for n in range(without)]  # type: ignore[dict-item]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def _do_jobs(found: Watched, far: ScriptedGateway, folder: Path) -> None:
    fleet = found.fleet
    fleet.cli("models", "add", "far", "--gateway", far.url, "--upstream-model", "far", "--key-env", "FAR_KEY")
    answers = iter([error(429, retry_after="1"), error(500)])
    far.answer = lambda asked: next(answers, None) or good(asked)
    corpus = _corpus(folder / "corpus.jsonl", _TEXTS, _WITHOUT)
    few = _corpus(folder / "few.jsonl", _FAR_TEXTS)
    with psycopg.connect(fleet.environment["VECTORMILL_DATABASE_URL"]) as connection:
        connection.execute("create table public.docs (id text primary key, v vector(256), check (id is null))")
    by_name = {
        "static": (corpus, "--model", "static"),
        "minilm": (few, "--model", "minilm"),
        "far": (few, "--model", "far"),
        "refused": (few, "--model", "static", "--into", "public.docs"),
    }
    found.jobs = {name: fleet.submit(*arguments) for name, arguments in by_name.items()}
    ends = {name: fleet.await_end(job)["state"] for name, job in found.jobs.items()}
    assert ends == {"static": "completed", "minilm": "completed", "far": "completed", "refused": "failed"}


def _ask_gateway(found: Watched) -> None:
    """Send requests that are answered, refused by a limit, and refused for their key."""
    with found.engine.begin() as connection:
        place = workspaces.create(connection, _WORKSPACE, 1.0)
        assert place
        workspaces.enable_models(connection, place, ["static"])
        workspaces.set_limits(connection, place, {"requests_per_minute": 1})
        token = keys.create(connection, place, "test").token
    found.tokens += [token, f"vm_{_SECRET}"]
    api = found.urls["api"].removesuffix("/metrics")
    body = {"model": "static", "input": [f"{_TEXT} {n}" for n in range(5)], "user": _KEY}
    eventually(lambda: found.fleet.scalar("select count(*) from vectormill.engines"), "an engine")
    for expected, key in ((200, token), (429, token), (401, found.tokens[-1])):
        reply = httpx.post(f"{api}/v1/embeddings", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)
        assert reply.status_code == expected, reply.text
    httpx.request("PROPFIND", f"{api}/{_WORKSPACE}")


def test_every_metric_is_served_as_the_list_says(watched: Watched) -> None:
    known = series()
    shown: set[str] = set()
    for process in metrics.PROCESSES:
        for one in watched.scrape(process.name):
            assert one.name in known, f"{process.name} shows {one.name}, which isn't in the list"
            noted = known[one.name]
            assert noted.process == process.name, one.name
            assert one.labels.keys() - {"le", "quantile"} == noted.labels.keys(), one.name
            for label, values in noted.labels.items():
                assert isinstance(values, str) or one.labels[label] in values, one
            shown.add(noted.name)
    assert {each.name for each in metrics.EVERY} - shown == set()


def test_what_a_rule_or_the_dashboard_asks_for_is_served(watched: Watched) -> None:
    shown: dict[str, set[str]] = {}
    for process in metrics.PROCESSES:
        for one in watched.scrape(process.name):
            shown.setdefault(one.name, set()).update(one.labels)
    for where, query in (*rule_queries(), *dashboard_queries()):
        for name, labels in asked_for(query):
            assert name in shown, f"{where} asks for {name}, which nobody serves"
            assert labels <= shown[name] | ADDED, f"{where} selects {name} by {labels - shown[name]}"


def test_the_list_says_what_each_means() -> None:
    for each in metrics.EVERY:
        assert each.meaning.strip(), each.name
        assert each.unit.strip(), each.name
        # Prometheus' naming convention: https://prometheus.io/docs/practices/naming/
        assert each.name.endswith("_total") == (each.kind == "counter"), each.name
        assert not ADDED & each.labels.keys(), each.name
        for unit in ("seconds", "bytes"):
            assert (each.unit == unit) == each.name.removesuffix("_total").endswith(f"_{unit}"), each.name
    assert len({each.name for each in metrics.EVERY}) == len(metrics.EVERY)


def test_a_worker_counts_what_its_jobs_come_to(watched: Watched) -> None:
    shown = watched.scrape("worker")
    for name in ("static", "minilm", "far"):
        account = watched.receipt(name)
        items = account["items"]
        if name == "static":  # the job that failed has the same model, so its texts count here too
            assert total(shown, "vectormill_worker_items_total", model=name, outcome="embedded") == items["embedded"]
        else:
            assert total(shown, "vectormill_worker_items_total", model=name) == items["in"]
            assert total(shown, "vectormill_worker_tokens_total", model=name) == account["tokens"]["prompt"]
        assert total(shown, "vectormill_worker_batches_total", model=name) >= 1
    steps = ("read", "tokenise", "embed", "write")
    counts = {step: total(shown, "vectormill_worker_step_seconds_count", model="static", step=step) for step in steps}
    assert all(count >= 4 for count in counts.values()), counts
    assert total(shown, "vectormill_worker_claims_total", model="static", outcome="done") >= 4
    assert total(shown, "vectormill_worker_claims_total", model="static", outcome="given_back") >= 1
    assert total(shown, "vectormill_worker_device_memory_bytes") > 10_000_000


def test_padding_can_be_told_from_tokens(watched: Watched) -> None:
    shown = watched.scrape("worker")
    tokens, padded = (
        {name: total(shown, f"vectormill_worker_{what}_total", model=name) for name in ("static", "minilm", "far")}
        for what in ("tokens", "padded_tokens")
    )
    assert padded["static"] == tokens["static"] > 0, "a flat list of ids has no padding"
    assert padded["minilm"] == tokens["minilm"] > 0, "nor have texts behind each other"
    assert not [
        one for one in shown if one.name == "vectormill_worker_padded_tokens_total" and one.labels["model"] == "far"
    ]


def test_a_gateways_answers_and_waits_are_counted(watched: Watched) -> None:
    shown = watched.scrape("worker")
    by_status = {
        kind: total(shown, "vectormill_worker_gateway_requests_total", model="far", status=kind)
        for kind in ("2xx", "429", "5xx", "4xx", "none")
    }
    assert by_status["429"] == by_status["5xx"] == 1
    assert by_status["2xx"] >= 2
    assert by_status["4xx"] == by_status["none"] == 0
    assert total(shown, "vectormill_worker_throttle_wait_seconds_total", model="far") > 0


def test_the_dispatcher_shows_how_things_stand(watched: Watched) -> None:
    def shown() -> list[Sample]:
        return watched.scrape("dispatcher")

    assert total(shown(), "vectormill_dispatcher_leads") == 1
    ended = {
        state: total(shown(), "vectormill_dispatcher_jobs_ended_total", state=state)
        for state in ("completed", "failed")
    }
    assert ended == {"completed": 3, "failed": 1}
    eventually(lambda: total(shown(), "vectormill_dispatcher_slots", model="static") == 2, "two slots")
    eventually(lambda: total(shown(), "vectormill_dispatcher_jobs") == 0, "no open job")
    with watched.engine.begin() as connection:
        rejects = connection.execute(text("select code, count(*) from vectormill.rejects group by code")).all()
    assert ("missing_text", _WITHOUT) in rejects, "which no worker has seen"
    for code, times in rejects:
        assert total(shown(), "vectormill_dispatcher_rejects_total", code=code) == times
    receipts = [watched.receipt(name)["items"] for name in watched.jobs]
    for outcome in ("embedded", "rejected", "cancelled", "reused"):
        expected = sum(items[outcome] for items in receipts)
        assert total(shown(), "vectormill_dispatcher_items_total", outcome=outcome) == expected
    assert total(shown(), "vectormill_dispatcher_messages_published_total", queue="embed.static") >= 4
    assert total(shown(), "vectormill_dispatcher_duty_seconds_count", duty="sweep") >= 1
    assert total(shown(), "vectormill_dispatcher_leases_expired_total") == 0


def test_the_api_counts_by_route_and_the_engine_by_model(watched: Watched) -> None:
    shown = watched.scrape("api")
    route = {"route": "/v1/embeddings", "method": "POST"}
    for status_, times in (("200", 1), ("429", 1), ("401", 1)):
        assert total(shown, "vectormill_api_requests_total", **route, status=status_) == times
    assert total(shown, "vectormill_api_requests_total", route="unknown", method="other") == 1
    assert total(shown, "vectormill_api_request_seconds_count", route="/v1/embeddings") == 3
    assert total(shown, "vectormill_api_refusals_total", limit="requests_per_minute") == 1
    tokens = total(shown, "vectormill_api_tokens_total", model="static")
    assert tokens > 0
    engine = watched.scrape("engine")
    assert total(engine, "vectormill_engine_tokens_total", model="static") == tokens
    assert total(engine, "vectormill_engine_items_total", model="static") == 5
    assert total(engine, "vectormill_engine_models_loaded") == 1


def test_no_text_and_no_key_is_in_a_log_a_metric_or_a_page_of_flower(watched: Watched) -> None:
    secrets = (_TEXT, _KEY, _SECRET, *watched.tokens)
    pages = {url: httpx.get(url).text for url in watched.urls.values()}
    for where in ("/", "/tasks", "/broker", "/api/workers", "/api/tasks?limit=1000", "/metrics"):
        pages[where] = watched.flower(where).text
    for task in watched.flower("/api/tasks").json():
        pages[task] = watched.flower(f"/task/{task}").text
    for log in watched.fleet.logs.glob("*.log"):
        pages[log.name] = log.read_text()
    assert "chunk_given_back" in pages["worker.log"], "the refused table is in the log"
    for where, page in pages.items():
        assert not [secret for secret in secrets if secret in page], where
    for url in watched.urls.values():
        assert _WORKSPACE not in pages[url], url
        assert not [job for job in watched.jobs.values() if str(job) in pages[url]], url


def _lines(fleet: Fleet) -> list[dict[str, Any]]:
    """Return all lines that a worker has logged."""
    return [json.loads(line) for line in (fleet.logs / "worker.log").read_text().splitlines()]


def test_a_workers_lines_are_json_with_what_they_are_about(watched: Watched) -> None:
    lines = _lines(watched.fleet)
    assert all(line["event"] and line["level"] and line["timestamp"] for line in lines)
    chunks = "select array_agg(id) from vectormill.chunks where job_id = :job"
    refused = str(watched.jobs["refused"])
    (given_back, *_) = [line for line in lines if line["event"] == "chunk_given_back" and line["job"] == refused]
    assert given_back["chunk"] in watched.fleet.scalar(chunks, job=watched.jobs["refused"])
    assert given_back["fence"] >= 1
    assert [line for line in lines if line.get("logger", "").startswith("celery")]
    ended = [line for line in lines if line["event"] == "chunk_ended" and line["job"] == str(watched.jobs["static"])]
    assert {line["chunk"] for line in ended} == set(watched.fleet.scalar(chunks, job=watched.jobs["static"]))
    assert all(line["fence"] >= 1 and line["outcome"] == "done" and line["seconds"] > 0 for line in ended)


def test_every_line_of_every_process_is_json(watched: Watched) -> None:
    logs = {file.stem: file.read_text().splitlines() for file in watched.fleet.logs.glob("*.log")}
    assert logs.keys() >= {"api", "dispatcher", "engine", "flower", "worker"}
    for name, lines in logs.items():
        for line in lines:
            assert line.startswith("{"), f"{name}: {line}"
            assert json.loads(line)["event"], f"{name}: {line}"


def test_library_code_logs_with_job_chunk_and_fence(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts[:10]))
    fleet.environment["MUTANT"] = "talkative"
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1, app="tests.acceptance.mutants:app")
    job = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(job)["state"] == "completed"
    chunk, fence = (
        fleet.scalar(f"select {what} from vectormill.chunks where job_id = :job", job=job) for what in ("id", "fence")
    )
    lines = _lines(fleet)
    said = {line["event"]: line for line in lines if line.get("logger") == "some.library"}
    assert said.keys() == {"tokenising", "renewing"}
    for line in said.values():
        assert (line["job"], line["chunk"], line["fence"]) == (str(job), chunk, fence)


def test_a_killed_childs_counts_stay_and_a_killed_workers_are_gone(
    fleet: Fleet, texts: list[str], tmp_path: Path
) -> None:
    fleet.environment["TMPDIR"] = str(tmp_path)
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"

    def start() -> None:
        before = fleet.scalar("select count(*) from vectormill.workers")
        fleet.start(
            "worker", "pipeline.cli", "worker", "--devices", "cpu", "--replicas", "1", VECTORMILL_METRICS_PORT=port
        )
        eventually(lambda: fleet.scalar("select count(*) from vectormill.workers") > before, "a worker")

    def embedded() -> float:
        return total(scrape(url), "vectormill_worker_items_total", outcome="embedded")

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts[:500]))
    fleet.start_dispatcher()
    start()
    (folder,) = tmp_path.glob("vectormill-metrics-*")
    assert fleet.await_end(fleet.submit(str(corpus), "--model", "static"))["state"] == "completed"
    assert embedded() == 500
    memory = total(scrape(url), "vectormill_worker_device_memory_bytes")
    assert memory > 0
    (child,) = (
        child for server in psutil.Process(fleet.processes["worker"].pid).children() for child in server.children()
    )
    child.kill()
    eventually(lambda: total(scrape(url), "vectormill_worker_device_memory_bytes") == 0, "memory to be let go")
    assert embedded() == 500, "what was counted stays"
    assert fleet.await_end(fleet.submit(str(corpus), "--model", "static"))["state"] == "completed"
    assert embedded() == 1_000

    fleet.kill("worker")
    start()
    (new,) = tmp_path.glob("vectormill-metrics-*")
    assert new != folder, "what a killed worker left is gone"
    assert embedded() == 0
    fleet.processes["worker"].terminate()
    assert fleet.processes["worker"].wait(60) == 0
    assert not list(tmp_path.glob("vectormill-metrics-*"))
