"""Progress line of a start or stop, and the detection of a child that stands still."""

import os
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli import waiting
from pipeline.cli.waiting import Waiting
from pipeline.embedded.processes import Standstill, cpu_seconds


def _wait_for(text: str, written: StringIO, times: int = 1) -> None:
    while written.getvalue().count(text) < times:
        time.sleep(0.01)


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_LINE_SECONDS", 0.01)
    written = StringIO()
    with Waiting(Console(file=written), "Starting") as line:
        line.show(["worker", "engine"])
        _wait_for("waiting for worker, engine\n", written, times=3)
    assert written.getvalue().splitlines()[-1] == "Starting  0 s  waiting for worker, engine"


def test_a_short_wait_without_a_terminal_says_nothing() -> None:
    written = StringIO()
    with Waiting(Console(file=written), "Starting") as line:
        line.show(["worker"])
    assert written.getvalue() == ""


def test_a_terminal_has_one_line_that_changes_and_goes() -> None:
    written = StringIO()
    with Waiting(Console(file=written, force_terminal=True, width=80), "Stopping") as line:
        line.show(["worker", "engine"])
        _wait_for("waiting for worker, engine", written)
        line.show(["engine"])
        _wait_for("waiting for engine", written)
    assert "\n\n" not in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K")


def test_a_process_that_computes_or_writes_to_its_log_does_not_stand_still(tmp_path: Path) -> None:
    now, log = 0.0, tmp_path / "a.log"
    standstill = Standstill(os.getppid(), log, clock=lambda: now)
    log.write_text("a line\n")
    now = 100.0
    assert standstill.seconds() == 0.0
    computing = Standstill(os.getpid(), log, clock=lambda: now)
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) == before:
        pass
    now = 200.0
    assert computing.seconds() == 0.0


def test_a_process_that_does_neither_stands_still(tmp_path: Path) -> None:
    now = 0.0
    # No process has this id, so nothing changes.
    standstill = Standstill(2**22 + 1, tmp_path / "a.log", clock=lambda: now)
    now = 90.0
    assert standstill.seconds() == 90.0
    now = 700.0
    assert standstill.seconds() == 700.0
