"""Marks of processes: found again while they live, whatever the clock says, and never mistaken for another."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.embedded import processes
from pipeline.embedded.processes import ProcessMark, find_process, mark_process
from pipeline.embedded.runtime import Running, find_running, write_running


@pytest.mark.parametrize("step_seconds", [-3_600.0, 0.0, 7.0, 86_400.0])
def test_a_process_is_found_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch, step_seconds: float) -> None:
    mark = mark_process("me", os.getpid())
    booted = psutil.boot_time() + step_seconds
    monkeypatch.setattr(f"psutil._ps{'osx' if sys.platform == 'darwin' else 'linux'}.boot_time", lambda: booted)
    found = find_process(mark)
    assert found
    assert found.pid == os.getpid()


def test_another_process_with_its_pid_is_not_it() -> None:
    mark = mark_process("me", os.getpid())
    assert find_process(ProcessMark(name="me", pid=mark.pid, started=mark.started - 60)) is None


def test_one_that_has_ended_is_not_found() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        mark = mark_process("child", child.pid)
        assert find_process(mark)
        child.communicate(b"\n")
    assert find_process(mark) is None


def test_a_record_of_an_earlier_boot_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that start with the machine may get the same pid at the same time of each run."""
    me = mark_process("up", os.getpid())
    running = Running(
        home=tmp_path,
        supervisor_pid=me.pid,
        supervisor_started=me.started,
        database_url="postgresql://here/x",
        redis_url="redis://here/0",
        api_url="http://127.0.0.1:8000",
        flower_url="http://127.0.0.1:5555",
        flower_password="secret",
        ready=True,
        children=(),
    )
    write_running(running)
    assert find_running(tmp_path) == running
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(processes, "_BOOT_ID", tmp_path / "boot_id")
    assert find_running(tmp_path) is None
