"""Processes that outlive the one that started them: recognised by pid and create time, never by name."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

# The create time is reckoned from the boot time, which moves a little with the clock.
_SAME_SECONDS = 2.0
_POLL_SECONDS = 0.2
_KILLED_SECONDS = 10.0


class ProcessMark(BaseModel):
    """What is needed to find a process again and to stop it."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    #: Create time, seconds since 1970.
    created: float
    #: The signal that asks it to end in order.
    stop_signal: int = signal.SIGTERM


def mark_process(name: str, pid: int, stop_signal: int = signal.SIGTERM) -> ProcessMark:
    """Note a process that was just started or is this one."""
    try:
        created = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        created = time.time()
    return ProcessMark(name=name, pid=pid, created=created, stop_signal=stop_signal)


def find_process(mark: ProcessMark) -> psutil.Process | None:
    """Return the marked process if it still lives. A zombie, or another with its pid, is not it."""
    try:
        process = psutil.Process(mark.pid)
        same = abs(process.create_time() - mark.created) < _SAME_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def wait_until_gone(mark: ProcessMark, seconds: float) -> bool:
    """Wait for the end of a process that isn't our child; `False` if it lives on after `seconds`."""
    deadline = time.monotonic() + seconds
    while find_process(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def stop_process(mark: ProcessMark, grace_seconds: float) -> None:
    """Stop the marked process in order, or by SIGKILL after the grace, and then what is left of its group."""
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


def processes_in(folder: Path, name: str) -> list[psutil.Process]:
    """Return the processes of this program that work in the folder, oldest pid first."""
    found = []
    for process in psutil.process_iter():
        # OSError: its folder is gone.
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.name() == name and (cwd := process.cwd()) and folder.samefile(cwd):
                found.append(process)
    return found


def kill_group(pid: int) -> None:
    """Send SIGKILL to all that is left of the process group that `pid` leads or led."""
    # PermissionError: some systems answer so when only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
