"""Nightly jobs of a scheduler, with real processes: jobs requested in SQL, upstream tables that are empty or broken,
and the webhooks about them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.acceptance.fleet import Fleet, eventually
from tests.support.jobs_made import run_sql
from tests.support.receiver import Receiver, receiving

_SECRET = "whsec_YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh"
_TEXTS = "select n::text as id, 'sack ' || n || ' of flour' as text from generate_series(1, 1000) n"
#: Query in which 20 % of the rows have no text.
_BROKEN = _TEXTS.replace("'sack '", "nullif(n % 5, 0) || 'sack '")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def night(fleet: Fleet, receiver: Receiver, database: str) -> Fleet:
    """Start a fleet that sends the receiver webhooks about the ends of the default workspace's jobs."""
    fleet.environment |= {
        "VECTORMILL_WEBHOOKS": receiver.url,
        "VECTORMILL_WEBHOOK_SECRET": _SECRET,
        "VECTORMILL_SQL_URL": database,
    }
    fleet.cli("workspaces", "set", "default", "--webhook", f"{receiver.url}/hooks")
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    return fleet


def ask(fleet: Fleet, query: str) -> str:
    """Request a job by `select vectormill.submit(…)`, as each night; return its id."""
    statement = "select vectormill.submit(query => :asked, model => 'static', idempotency_key => 'nightly')::text"
    return str(fleet.scalar(statement, asked=query))


def told(receiver: Receiver, number: int) -> dict[str, Any]:
    """Wait for the receiver's event of this number, verify its signature, and return it."""
    receiver.wait_for(number)
    _, headers, body = receiver.got[number - 1]
    OpenAI(api_key="none", webhook_secret=_SECRET).webhooks.verify_signature(body, headers)
    event: dict[str, Any] = json.loads(body)
    return event


def test_a_job_asked_for_in_sql_is_run_and_told_of_once(night: Fleet, receiver: Receiver) -> None:
    job = ask(night, _TEXTS)
    event = told(receiver, 1)
    assert (event["type"], event["data"]["id"]) == ("job.completed", job)
    assert event["data"]["items"] == {
        "in": 1000,
        "embedded": 1000,
        "reused": 0,
        "unchanged": 0,
        "rejected": 0,
        "cancelled": 0,
        "removed": 0,
        "forgotten": 0,
    }
    assert ask(night, _TEXTS) == job
    assert night.scalar("select state from vectormill.job_status where id = cast(:id as uuid)", id=job) == "completed"
    assert night.scalar("select count(*) from vectormill.embeddings") == 1000
    assert night.scalar("select count(*) from vectormill.jobs") == 1


def test_an_empty_upstream_fails_and_is_told_of(night: Fleet, receiver: Receiver, database: str) -> None:
    job = ask(night, f"{_TEXTS} where false")
    event = told(receiver, 1)
    assert (event["type"], event["data"]["id"]) == ("job.failed", job)
    assert event["data"]["reason"] == "empty_source"
    look = "select state || ' ' || reason from vectormill.job_status where id = cast(:id as uuid)"
    assert night.scalar(look, id=job) == "failed empty_source"

    asked = ("submit", "--from", database, "--query", f"{_TEXTS} where false", "--model", "static", "--wait")
    for way, code in ((), 2), (("--allow-empty",), 0):
        done = night.cli(*asked, *way, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert "no rows; there is nothing to embed." in done.stderr
    assert night.scalar("select count(*) from vectormill.jobs") == 0


def test_a_broken_upstream_fails_before_anybody_reads_a_part_of_it(
    night: Fleet, receiver: Receiver, database: str, tmp_path: Path
) -> None:
    asked = ("submit", "--from", database, "--query", _BROKEN, "--model", "static", "--wait")
    run_sql(night.engine, "create table public.docs (id text primary key, vector vector(256))")
    ways = (
        (),
        ("--output", str(tmp_path / "vectors")),
        ("--into", "public.docs", "--key-column", "id"),
    )
    for number, way in enumerate(ways, start=1):
        done = night.cli(*asked, *way, check=False)
        assert done.returncode == 3, done.stderr
        assert "200 items rejected, 100 allowed" in " ".join(done.stderr.split())
        event = told(receiver, number)
        assert (event["type"], event["data"]["reason"]) == ("job.failed", "too_many_rejects")
        assert event["data"]["items"] == {
            "in": 1000,
            "embedded": 0,
            "reused": 0,
            "unchanged": 0,
            "rejected": 200,
            "cancelled": 800,
            "removed": 0,
            "forgotten": 0,
        }
    assert night.scalar("select count(*) from public.docs") == 0
    assert night.scalar("select count(*) from vectormill.embeddings") == 0
    names = {path.name for path in (tmp_path / "vectors").rglob("*")}
    assert not {"_SUCCESS", "_manifest.json"} & names
    assert not [name for name in names if name.endswith(".parquet")]


def test_a_file_read_by_reference_that_is_broken_never_looks_whole(
    night: Fleet, receiver: Receiver, tmp_path: Path
) -> None:
    rows = [{"id": str(n), "text": "" if n % 5 == 0 else f"sack {n}"} for n in range(1000)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "vectors"
    done = night.cli(
        *("submit", str(tmp_path / "docs.jsonl"), "--model", "static", "--by-reference"),
        *("--output", str(output), "--webhook", f"{receiver.url}/of-this-job", "--wait"),
        check=False,
    )
    assert done.returncode == 3
    assert told(receiver, 1)["data"]["reason"] == "too_many_rejects"
    assert receiver.got[0][0] == "/of-this-job"
    assert not (output / "_SUCCESS").exists()
    assert not list(output.glob("*.parquet"))


def test_a_webhook_is_told_though_the_dispatcher_dies(night: Fleet, receiver: Receiver) -> None:
    receiver.answer = lambda number: 503 if number == 0 else 200
    ask(night, _TEXTS)
    receiver.wait_for(1)
    eventually(lambda: night.scalar("select answer = 'answers 503' from vectormill.events"), "a try that failed")
    night.kill("dispatcher")
    night.start_dispatcher()
    receiver.wait_for(2)
    (_, first, body), (_, second, again) = receiver.got
    assert (first["webhook-id"], body) == (second["webhook-id"], again)
    eventually(lambda: night.scalar("select state = 'delivered' from vectormill.events"), "the answer to be kept")
