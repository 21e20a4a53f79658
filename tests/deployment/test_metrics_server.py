"""Metrics servers: the ports that show metrics, and the clean-up of the folders in which workers keep them."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client import generate_latest

from pipeline.infra import metrics, metrics_server
from tests.acceptance.fleet import Fleet, eventually


def _line(fleet: Fleet, event: str) -> dict[str, object] | None:
    lines = (fleet.logs / "dispatcher.log").read_text().splitlines()
    return next((line for line in map(json.loads, lines) if line["event"] == event), None)


def test_a_port_that_another_has_keeps_nobody_from_work(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fleet.environment["VECTORMILL_METRICS_PORT"] = str(port)
        fleet.start_dispatcher()
    line = _line(fleet, "metrics_not_served")
    assert line
    assert line["port"] == port


def test_a_free_port_is_said_in_the_log(fleet: Fleet) -> None:
    fleet.environment["VECTORMILL_METRICS_PORT"] = "0"
    fleet.start_dispatcher()
    line = eventually(lambda: _line(fleet, "metrics_served"), "a port")
    assert line["host"] == "127.0.0.1"
    assert "vectormill_dispatcher_leads" in httpx.get(f"http://127.0.0.1:{line['port']}/metrics").text


def test_one_that_stands_by_shows_nothing_of_how_things_stand(fleet: Fleet) -> None:
    fleet.start_dispatcher()
    fleet.start("second", "pipeline.cli", "dispatcher", VECTORMILL_METRICS_PORT="0")

    def port() -> int | None:
        log = (fleet.logs / "second.log").read_text()
        return next((json.loads(line)["port"] for line in log.splitlines() if "metrics_served" in line), None)

    url = f"http://127.0.0.1:{eventually(port, 'a port')}/metrics"
    assert "vectormill_dispatcher_leads 0.0" in httpx.get(url).text
    assert "vectormill_dispatcher_slots{" not in httpx.get(url).text
    fleet.kill("dispatcher")
    eventually(lambda: "vectormill_dispatcher_leads 1.0" in httpx.get(url).text, "the second one to lead")
    eventually(lambda: 'vectormill_dispatcher_slots{model="static"}' in httpx.get(url).text, "how things stand")


def test_folders_go_when_nobody_holds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held, left, young, anothers = (tmp_path / f"vectormill-metrics-{name}" for name in ("held", "left", "young", "x"))
    for folder in (held, left, young):
        folder.mkdir()
        (folder / "counter_1.db").write_bytes(b"")
    anothers.symlink_to(young)
    (left / "lock").touch()
    (held / "lock").touch()
    with (held / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = metrics_server.make_folder()
    assert {folder.name for folder in tmp_path.iterdir()} == {held.name, young.name, anothers.name, made.name}
    assert os.stat(made).st_mode & 0o077 == 0
    again = metrics_server.make_folder()
    assert made.exists(), "this process holds it"
    assert not held.exists()
    assert again != made


_CHILD = """
import os
from pipeline.infra import metrics
metrics.WORKER_BATCHES.labels("m").inc(3)
metrics.WORKER_CHUNK_SECONDS.labels("m").observe(7)
metrics.WORKER_STEP_SECONDS.labels("m", "read").observe(0.5)
metrics.WORKER_DEVICE_MEMORY_BYTES.labels("cpu").set(1_000)
os._exit(70)
"""


def test_counts_of_the_dead_stay_and_their_files_go(tmp_path: Path) -> None:
    shown = metrics_server.of_folder(metrics.WORKER, tmp_path)
    for times in range(1, 4):
        environment = {**os.environ, metrics_server.FOLDER_VARIABLE: str(tmp_path)}
        assert subprocess.run([sys.executable, "-c", _CHILD], env=environment, check=False).returncode == 70
        for _ in range(2):  # a scrape changes nothing
            page = generate_latest(shown).decode()
            assert f'vectormill_worker_batches_total{{model="m"}} {3 * times:.1f}\n' in page
            assert f'vectormill_worker_chunk_seconds_bucket{{le="10.0",model="m"}} {times:.1f}\n' in page
            assert 'vectormill_worker_chunk_seconds_bucket{le="5.0",model="m"} 0.0\n' in page
            assert f'vectormill_worker_step_seconds_sum{{model="m",step="read"}} {0.5 * times}\n' in page
            assert "vectormill_worker_device_memory_bytes{" not in page
        files = {file.name for file in tmp_path.iterdir()}
        assert files == {"counter_gone.db", "histogram_gone.db", "summary_gone.db"}
