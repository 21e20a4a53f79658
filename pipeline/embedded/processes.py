"""Processes that may outlive the one that started them, identified by pid and start, never by name."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

# More than the rounding of a start, and less than it takes to give a pid again.
_SAME_SECONDS = 2.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_POLL_SECONDS = 0.2
_KILLED_SECONDS = 10.0


class ProcessMark(BaseModel):
    """Identity of a process, by which it can be found again and stopped."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    #: Start, seconds since the machine's: a clock that is set moves it in no way, unlike a time of day.
    started: float
    #: Signal that asks it to shut down.
    stop_signal: int = signal.SIGTERM


def mark_process(name: str, pid: int, stop_signal: int = signal.SIGTERM) -> ProcessMark:
    """Return the mark of a process that has just been started, or of this process."""
    try:
        started = _started(psutil.Process(pid))
    except psutil.NoSuchProcess:
        started = time.time() - psutil.boot_time()
    return ProcessMark(name=name, pid=pid, started=started, stop_signal=stop_signal)


def _started(process: psutil.Process) -> float:
    # psutil adds the boot time, which it computes from the clock.
    return process.create_time() - psutil.boot_time()


def boot_id() -> str:
    """Return what tells this run of the machine from earlier ones, in which a process may have had the same mark; empty
    where nothing does."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return ""


def find_process(mark: ProcessMark) -> psutil.Process | None:
    """Return the marked process if it is still alive. A zombie, or another process with its pid, doesn't count."""
    try:
        process = psutil.Process(mark.pid)
        same = abs(_started(process) - mark.started) < _SAME_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def wait_until_gone(mark: ProcessMark, seconds: float) -> bool:
    """Wait for the end of a process that isn't our child. Return False if it is still alive after `seconds`."""
    deadline = time.monotonic() + seconds
    while find_process(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def stop_process(mark: ProcessMark, grace_seconds: float) -> None:
    """Stop the marked process by its signal, or by SIGKILL after the grace, and then kill the rest of its group."""
    process = find_process(mark)
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        process.send_signal(mark.stop_signal)
    if not wait_until_gone(mark, grace_seconds):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    kill_group(mark.pid)
    wait_until_gone(mark, _KILLED_SECONDS)


def our_module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a Python module of ours."""
    return (sys.executable, "-m", name, *arguments)


def our_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of such a process: our own with `more`, and no imports from the current folder."""
    return {**os.environ, **more, "PYTHONSAFEPATH": "1"}


class Standstill:
    """Detector of a process that does nothing: neither it nor its descendants use the CPU, and its log doesn't grow.

    A busy machine slows a process down but doesn't stop it, so this tells a slow start from a start that hangs.
    """

    def __init__(self, pid: int, log: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid, self._log, self._clock = pid, log, clock
        self._seen = self._look()
        self._moved = clock()

    def seconds(self) -> float:
        """Check again, and return the time since the last check that saw a change."""
        seen = self._look()
        if seen != self._seen:
            self._seen, self._moved = seen, self._clock()
        return self._clock() - self._moved

    def _look(self) -> tuple[float, int]:
        return cpu_seconds(self._pid), self._log.stat().st_size if self._log.exists() else 0


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its descendants that are alive or were waited for."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times())
    return total


def processes_in(folder: Path, name: str) -> list[psutil.Process]:
    """Return the processes with this program's name and this working folder, lowest pid first."""
    found = []
    for process in psutil.process_iter():
        # OSError: the process' folder is gone.
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.name() == name and (cwd := process.cwd()) and folder.samefile(cwd):
                found.append(process)
    return found


def processes_from(folder: Path) -> list[psutil.Process]:
    """Return the processes whose executable is below the folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if Path(process.exe()).is_relative_to(folder):
                found.append(process)
    return found


def kill_group(pid: int) -> None:
    """Send SIGKILL to all that is left of the process group that `pid` leads or led."""
    # PermissionError: some systems raise it when only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
