"""The Python client by itself: what its import costs, where it looks for an api, and when it sends something again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest

import vectormill
from vectormill import calls, transport


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


def _record(home: Path, pid: int, **more: object) -> None:
    (home / "run").mkdir(parents=True)
    record = {"supervisor_pid": pid, "ready": True, "api_url": "http://127.0.0.1:1", "api_key": "vm_local", **more}
    (home / "run" / "up.json").write_text(json.dumps(record))


def test_the_nearest_up_is_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(vectormill.ServiceUnreachable, match="vectormill up"):
        vectormill.connect()
    _record(elsewhere / ".vectormill", os.getpid())
    (elsewhere / "below").mkdir()
    monkeypatch.chdir(elsewhere / "below")
    assert transport.local_api() == ("http://127.0.0.1:1", "vm_local")
    _record(elsewhere / "home", os.getpid(), ready=False)
    monkeypatch.setenv("VECTORMILL_HOME", str(elsewhere / "home"))
    with pytest.raises(vectormill.ServiceUnreachable):
        vectormill.connect()


def test_an_up_that_is_dead_is_passed_over(elsewhere: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _record(elsewhere / ".vectormill", ended.pid)
    with pytest.raises(vectormill.ServiceUnreachable):
        vectormill.connect()


def test_the_environment_names_an_api(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTORMILL_API_URL", "http://mill.example")
    with pytest.raises(vectormill.UserError, match="needs a key"):
        vectormill.connect()
    monkeypatch.setenv("VECTORMILL_API_KEY", "vm_1")
    assert "http://mill.example" in repr(vectormill.connect())


def _steps(*replies: httpx.Response | Exception) -> tuple[list[object], object]:
    """Return the steps of an exchange with these replies, and its answer or error."""
    exchange = transport._exchange(calls.models(), [], "http://mill.example")
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
