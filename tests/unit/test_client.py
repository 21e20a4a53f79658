"""The Python client by itself: what its import costs, where it looks for an api, and when it sends something again."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2 as httpx
import polars as pl
import psutil
import pytest

import vectormill
from vectormill import calls, rows, transport
from vectormill.job import Watch


def test_its_import_loads_nothing_heavy() -> None:
    heavy = ("pipeline", "workers", "torch", "numpy", "pyarrow", "httpx2", "rich", "narwhals")
    program = f"import sys, vectormill; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert vectormill.__version__


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty folder, without an api in the environment."""
    for name in ("VECTORMILL_API_URL", "VECTORMILL_API_KEY", "VECTORMILL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _record(home: Path, pid: int, /, **more: object) -> Path:
    (home / "run").mkdir(parents=True, exist_ok=True)
    started = psutil.Process().create_time() - psutil.boot_time()
    own = {"home": str(home), "supervisor_pid": pid, "supervisor_started": started}
    record = {**own, "ready": True, "api_url": "http://127.0.0.1:1", "api_key": "vm_local", **more}
    path = home / "run" / "up.json"
    path.write_text(json.dumps(record))
    path.chmod(0o600)
    return path


def test_the_nearest_up_is_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(vectormill.ServiceUnreachable, match="vectormill up"):
        vectormill.connect()
    _record(elsewhere / ".vectormill", os.getpid())
    (elsewhere / "below").mkdir()
    monkeypatch.chdir(elsewhere / "below")
    assert transport.local_api() == ("http://127.0.0.1:1", "vm_local")
    assert vectormill._address(None, "vm_other") == ("http://127.0.0.1:1", "vm_other")
    _record(elsewhere / "home", os.getpid(), ready=False)
    monkeypatch.setenv("VECTORMILL_HOME", str(elsewhere / "home"))
    with pytest.raises(vectormill.ServiceUnreachable):
        vectormill.connect()


@pytest.mark.parametrize(
    "fault",
    [
        {"supervisor_pid": 0},
        {"supervisor_started": 1.0},
        {"home": "/elsewhere"},
        {"supervisor_pid": "1"},
        "mode",
        "text",
    ],
)
def test_a_record_that_is_not_of_a_running_up_is_passed_over(elsewhere: Path, fault: dict[str, object] | str) -> None:
    path = _record(elsewhere / ".vectormill", os.getpid(), **(fault if isinstance(fault, dict) else {}))
    if fault == "mode":
        path.chmod(0o644)  # somebody else may have written it
    elif fault == "text":
        path.write_text("{")
    with pytest.raises(vectormill.ServiceUnreachable):
        vectormill.connect()


def test_an_up_that_is_dead_is_passed_over(elsewhere: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _record(elsewhere / ".vectormill", ended.pid)
    with pytest.raises(vectormill.ServiceUnreachable):
        vectormill.connect()


def test_an_address_and_a_key_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(vectormill.UserError, match="http://"):
        vectormill.connect("mill.example:8000", "vm_1")
    with pytest.raises(vectormill.UserError, match="copied whole"):
        vectormill.connect("http://mill.example", "vm_1\n")


def test_the_environment_names_an_api(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTORMILL_API_URL", "http://mill.example")
    with pytest.raises(vectormill.UserError, match="needs a key"):
        vectormill.connect()
    monkeypatch.setenv("VECTORMILL_API_KEY", "vm_1")
    assert "http://mill.example" in repr(vectormill.connect())


def _steps(*replies: httpx.Response | Exception, call: calls.Call[Any] | None = None) -> tuple[list[object], object]:
    """Return the steps of an exchange with these replies, and its answer or error."""
    exchange = transport._exchange(call or calls.models(), [], "http://mill.example")
    steps: list[object] = []
    coming, reply = iter(replies), None
    try:
        while True:
            step = exchange.send(reply)
            steps.append(step if isinstance(step, float) else "sent")
            reply = None if isinstance(step, float) else next(coming)
    except StopIteration as done:
        return steps, done.value
    except vectormill.VectormillError as error:
        return steps, error


def test_what_may_succeed_is_sent_again() -> None:
    good = httpx.Response(200, json={"data": []})
    busy = httpx.Response(503, json={"detail": "a database is away."}, headers={"retry-after": "7"})
    assert _steps(good) == (["sent"], [])
    assert _steps(busy, httpx.ConnectError("no"), good) == (["sent", 7.0, "sent", 1.0, "sent"], [])
    steps, error = _steps(busy, busy, busy, busy)
    assert (steps.count("sent"), type(error), str(error)) == (4, vectormill.ServiceUnreachable, "a database is away.")
    refused = httpx.Response(400, json={"detail": "model: no such.", "field": "model"})
    steps, error = _steps(refused)
    assert isinstance(error, vectormill.UserError)
    assert (steps, error.field, error.status, error.retryable) == (["sent"], "model", 400, False)
    broken = httpx.Response(500, text="<html>")
    steps, error = _steps(broken)
    assert (steps, str(error)) == (["sent"], "the api answers 500.")


def test_what_may_have_been_done_is_not_done_again() -> None:
    away, gone = httpx.Response(504, json={"detail": "a balancer's."}), httpx.ReadTimeout("no answer")
    for call in (calls.dropping("docs"), calls.retry("docs")):
        for reply in (away, gone):
            steps, error = _steps(reply, call=call)
            assert (steps, type(error)) == (["sent"], vectormill.ServiceUnreachable)
        steps, _ = _steps(httpx.ConnectError("no"), httpx.Response(204), call=calls.dropping("docs"))
        assert steps == ["sent", 0.5, "sent"]


def test_a_busy_collection_is_asked_again_as_long_as_it_takes() -> None:
    busy = httpx.Response(409, json={"title": "collection busy", "detail": "job 1 syncs it."})
    made = httpx.Response(201, json={"id": "0198c2d1-0000-7000-8000-000000000000", "name": "docs", "state": "queued"})
    call = calls.sync("docs", None, queue=True, idempotency_key=None, options={})
    steps, status = _steps(*[busy] * 7, made, call=call)
    assert (steps.count("sent"), isinstance(status, vectormill.JobStatus)) == (8, True)
    _, error = _steps(busy, call=calls.sync("docs", None, queue=False, idempotency_key=None, options={}))
    assert isinstance(error, vectormill.CollectionBusy)


def test_answers_that_no_api_gives() -> None:
    _, error = _steps(httpx.Response(200, text="<html>"))
    assert str(error) == "the answer isn't an api's; is the url right?"
    _, error = _steps(httpx.Response(404, json=["no", "object"]))
    assert (type(error), str(error)) == (vectormill.NotFound, "the api answers 404.")


def test_options_that_are_false_or_none_at_all_are_sent() -> None:
    call = calls.submission(
        [], model=None, text=None, key=None, name=None, carry=(), labels=None, idempotency_key=None,
        options={"reuse": False, "max_rejects": 0, "split": None},
    )  # fmt: skip
    assert call.body == {"reuse": False, "max_rejects": 0}
    assert call.form() == {"reuse": False, "max_rejects": 0}


def _status(state: str, reason: str | None = None) -> vectormill.JobStatus:
    return vectormill.JobStatus(id=UUID(int=1), name="docs", state=state, reason=reason)


def test_a_wait_ends_when_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("vectormill.job.time.monotonic", lambda: clock)
    watch, away = Watch(None), vectormill.ServiceUnreachable("away")
    assert watch.look("docs", _status("running")) is None
    clock = 59.0
    assert watch.look("docs", away) is None
    assert watch.look("docs", _status("paused", "by_user")) is None
    clock = 100.0
    assert watch.look("docs", away) is None
    clock = 120.0
    with pytest.raises(vectormill.ServiceUnreachable):
        watch.look("docs", away)
    assert watch.look("docs", done := _status("completed")) is done
    for status in (_status("failed"), _status("cancelled"), _status("paused", "budget_spent")):
        with pytest.raises(vectormill.JobNotCompleted):
            watch.look("docs", status)
    with pytest.raises(TimeoutError):
        Watch(0).look("docs", _status("running"))


def test_only_a_string_alone_is_a_uri(tmp_path: Path) -> None:
    assert rows.source_of("s3://bucket/docs.parquet") == "s3://bucket/docs.parquet"
    texts = ["see https://example.com", "http://example.org"]
    assert rows.source_of(texts) is None
    (path,) = rows.files_of(texts, tmp_path)
    assert [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()] == texts
    with pytest.raises(vectormill.UserError, match="can't be written as Parquet"):
        rows.files_of(pl.Series("text", ["a"]), tmp_path)


def test_downloads_and_uploads_have_time() -> None:
    with vectormill.connect("http://mill.example", "vm_1") as mill:
        assert mill._transport._client.timeout.read == 3_600
    sent: Any = next(
        transport._exchange(calls.sync("docs", None, queue=True, idempotency_key=None, options={}), [], "")
    )
    assert sent["timeout"].read == 3_600
    search: Any = next(transport._exchange(calls.search("/jobs/docs", "a mill", 3, None), [], ""))
    assert search["timeout"].read > 120, "as long as it may wait in an engine"
