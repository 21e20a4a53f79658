"""Real Flower beside a fleet: its pages, and who may see them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx2 as httpx
import pytest

from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.support.ports import free_port
from tests.support.scripted_gateway import Answer, error, scripted_gateway

_PASSWORD = "sesame, open"
_WORD = "unmistakable"


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[httpx.Client]:
    """Run a Flower; yield a client with its password."""
    port = free_port()
    fleet.start(
        "flower",
        *("pipeline.cli", "flower"),
        VECTORMILL_FLOWER_PORT=str(port),
        VECTORMILL_FLOWER_PASSWORD=_PASSWORD,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=("vectormill", _PASSWORD), timeout=30) as client:
        eventually(lambda: _answers(client), "a Flower that answers")
        yield client


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


def test_tasks_are_found_by_job_and_chunk_and_show_no_text(fleet: Fleet, flower: httpx.Client, tmp_path: Path) -> None:
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    texts = [f"text {number} is {_WORD}" for number in range(600)]
    job = fleet.submit(str(write_corpus(tmp_path / "corpus.jsonl", texts)), "--model", "static")
    fleet.await_end(job)
    chunks = fleet.scalar("select array_agg(id order by id) from vectormill.chunks")
    assert len(chunks) > 1

    def found(search: str) -> dict[str, dict[str, str]]:
        reply: dict[str, dict[str, str]] = flower.get("/api/tasks", params={"search": search}).json()
        return reply

    items = fleet.scalar("select array_agg(items order by id) from vectormill.chunks")
    expected = {
        f"chunk {at}/{len(chunks)}, {count} items, corpus (job={job}, chunk={chunk})"
        for at, (chunk, count) in enumerate(zip(chunks, items, strict=True), start=1)
    }
    eventually(lambda: {task["args"] for task in found(str(job)).values()} >= expected, "tasks of all chunks")
    eventually(lambda: {task["state"] for task in found(str(job)).values()} == {"SUCCESS"}, "their results")
    assert {task["name"] for task in found(str(job)).values()} == {"corpus:static"}
    results = [task["result"] for task in found(str(job)).values() if "embedded" in task["result"]]
    counted = [re.fullmatch(r"(\d+) embedded, ([\d,]+) tokens, \d+\.\d s", result) for result in results]
    assert sum(int(match[1]) for match in counted if match) == len(texts)
    (found_one,) = {task["args"] for task in found(f"chunk={chunks[1]}").values()}
    assert found_one.startswith(f"chunk 2/{len(chunks)}, ")
    assert found(str(UUID(int=0))) == {}
    queues = set(re.findall(r'<tr id="([^"]+)"', flower.get("/broker").text))
    assert "embed.static" in queues

    pages = ["/", "/tasks", "/broker", "/api/workers", "/api/tasks", "/metrics"]
    pages += [f"{start}{task}" for task in found(str(job)) for start in ("/task/", "/api/task/info/")]
    for page in pages:
        reply = flower.get(page)
        assert reply.status_code == 200, page
        assert _WORD not in reply.text, page
    assert str(job) in flower.get("/tasks/datatable", params=_table(str(job))).text


def test_a_worker_bears_device_and_host(fleet: Fleet, flower: httpx.Client) -> None:
    fleet.start("worker", "pipeline.cli", "worker", "--devices", "cpu", "--replicas", "1")
    named = "select exists (select from vectormill.workers where name is not null)"
    eventually(lambda: fleet.scalar(named), "a worker that shows itself")
    worker = fleet.scalar("select name from vectormill.workers")
    assert re.fullmatch(rf"cpu-[0-9a-f]{{6}}@{re.escape(gethostname())}", worker)
    assert flower.get(f"/worker/{quote(worker)}").status_code == 200
    assert worker in flower.get("/workers", params={"json": "1"}).text


def test_tasks_that_end_no_chunk_say_why(fleet: Fleet, flower: httpx.Client, tmp_path: Path) -> None:
    fleet.start_dispatcher()
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a text"] * 40)
    job = fleet.submit(str(corpus), "--by-reference", "--model", "static", "--name", "gone")
    corpus.unlink()
    fleet.start_worker(replicas=1)
    fleet.await_end(job)

    def failed() -> list[Any]:
        return list(flower.get("/api/tasks", params={"search": "state:FAILURE name:gone"}).json().values())

    eventually(failed, "a task that failed")
    assert {task["name"] for task in failed()} == {"gone:static"}
    assert all(task["exception"].startswith("Refused('SourceChanged: ") for task in failed())
    page = flower.get("/tasks/datatable", params=_table("state:FAILURE name:gone")).json()
    assert [row["result"] for row in page["data"]] == [task["exception"] for task in failed()]


@pytest.mark.parametrize(
    ("answer", "state", "told"),
    [
        (error(429, retry_after="300"), "RETRY", "GivenBack('GatewayBusy: "),
        (error(401), "FAILURE", "Refused('GatewayRefused: "),
    ],
    ids=["busy", "refused"],
)
def test_what_an_upstream_refuses_is_told_without_its_words(
    fleet: Fleet, flower: httpx.Client, tmp_path: Path, answer: Answer, state: str, told: str
) -> None:
    fleet.environment["FAR_KEY"] = "sk-1"
    with scripted_gateway() as gateway:
        where = ("--gateway", gateway.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
        fleet.cli("models", "add", "far", *where)
        gateway.answer = lambda _: answer
        fleet.start_dispatcher()
        fleet.start_worker(replicas=1)
        fleet.submit(str(write_corpus(tmp_path / "corpus.jsonl", ["a text"])), "--model", "far", "--name", "away")

        def told_so() -> bool:
            """Another message of the chunk that waits may not have been claimed at all."""
            search = {"search": f"state:{state} name:away"}
            tasks = flower.get("/api/tasks", params=search).json().values()
            return any(task["exception"].startswith(told) for task in tasks)

        eventually(told_so, "a task that says why")
        assert "quotes the text" not in flower.get("/api/tasks").text


def _table(search: str) -> dict[str, str]:
    """Return the parameters that the page of tasks sends for a search."""
    return {
        "draw": "1",
        "start": "0",
        "length": "10",
        "search[value]": search,
        "order[0][column]": "0",
        "order[0][dir]": "asc",
        "columns[0][data]": "name",
    }


def test_nothing_but_the_health_check_is_open(fleet: Fleet, flower: httpx.Client) -> None:
    closed = ("/", "/tasks", "/broker", "/metrics", "/api/workers", "/api/tasks", "/api/queues/length")
    for auth in (None, ("vectormill", "wrong"), ("other", _PASSWORD)):
        for page in closed:
            reply = httpx.get(f"{flower.base_url}{page}", auth=auth)
            assert reply.status_code == 401, page
    assert httpx.get(f"{flower.base_url}/healthcheck").text == "OK"


def test_it_looks_and_does_nothing(fleet: Fleet, flower: httpx.Client) -> None:
    message = json.dumps({"args": ["0", 0]})
    for action in ("task/send-task/vectormill.run_chunk", "task/revoke/x", "worker/shutdown/x"):
        assert flower.post(f"/api/{action}", content=message).status_code in (403, 404), action


def test_its_settings(fleet: Fleet) -> None:
    program = """
import json, flower.options, pipeline.cli
from pathlib import Path
from tornado.options import options
options.parse_config_file(str(Path(pipeline.cli.__file__).with_name("flowerconfig.py")))
names = ("address", "basic_auth", "cookie_secret", "max_tasks", "purge_offline_workers", "read_only")
print(json.dumps({name: getattr(options, name) for name in names}))
"""
    environment = {**os.environ, **fleet.environment, "VECTORMILL_FLOWER_PASSWORD": _PASSWORD}

    def read() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    settings = read()
    secret = settings.pop("cookie_secret")
    assert settings == {
        "address": "127.0.0.1",
        "basic_auth": [f"vectormill:{_PASSWORD}"],
        "max_tasks": 10_000,
        "purge_offline_workers": 300,
        "read_only": True,
    }
    assert len(secret) >= 32
    assert _PASSWORD not in secret
    assert read()["cookie_secret"] == secret, "sessions outlive a restart"
