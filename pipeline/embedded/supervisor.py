"""Starts children in order, restarts what dies, and stops all in reverse order."""

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import BinaryIO

import structlog

from pipeline.embedded.files import last_lines, open_log
from pipeline.embedded.processes import ProcessMark, kill_group, mark_process
from pipeline.errors import ServerFailed

_READY_POLL_SECONDS = 0.2
_FIRST_DELAY_SECONDS, _LAST_DELAY_SECONDS = 0.1, 5.0
#: A child that lived this long starts again without the delay that grew before.
_STEADY_SECONDS = 30.0
#: A child that died this often before it was ready will not become so.
_START_DEATHS = 5
_HASTENED_GRACE_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to keep alive. It leads a session of its own: a terminal's Ctrl-C doesn't reach it."""

    #: Also the name of its log.
    name: str
    command: tuple[str, ...]
    #: The whole environment.
    env: Mapping[str, str]
    cwd: Path
    #: Whether it serves; asked every 0.2 s while it starts. It mustn't raise.
    ready: Callable[[], bool]
    ready_seconds: float = 60.0
    #: The account it runs as, if not ours.
    account: struct_passwd | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    #: After this long it gets SIGKILL, with its whole process group.
    stop_grace_seconds: float = 10.0


class _Slot:
    """A child and the process that plays it at present."""

    def __init__(self, child: Child, log: Path, wake: Callable[[], None]) -> None:
        self.child = child
        self.log = log
        self.deaths = 0
        self._wake = wake
        self._delay = _FIRST_DELAY_SECONDS
        self._due: float | None = None
        self.launch()

    def launch(self) -> None:
        try:
            with open_log(self.log) as log:
                self._process = _spawn(self.child, log)
        except OSError as error:
            raise ServerFailed(f"{self.child.name} can't be started: {error}") from error
        self._due = None
        self._launched = time.monotonic()
        # Marked before it is waited for: until then its pid can't become another's.
        self.mark = mark_process(self.child.name, self._process.pid, self.child.stop_signal)
        threading.Thread(target=self._reap, args=(self._process,), daemon=True).start()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._wake()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def revive(self) -> bool:
        """Launch again what died, once its delay has passed; whether that happened."""
        if self.alive:
            return False
        if self._due is None:
            self._note_death()
        if self._due is None or time.monotonic() < self._due:
            return False
        self.launch()
        return True

    def _note_death(self) -> None:
        kill_group(self._process.pid)
        now = time.monotonic()
        self.deaths += 1
        if now - self._launched > _STEADY_SECONDS:
            self._delay = _FIRST_DELAY_SECONDS
        self._due = now + self._delay
        _log.warning(
            "child_died",
            child=self.child.name,
            exit_code=self._process.returncode,
            restart_in_seconds=self._delay,
            log=str(self.log),
        )
        self._delay = min(2 * self._delay, _LAST_DELAY_SECONDS)

    def seconds_to_launch(self) -> float | None:
        """How long until it is launched again; `None` if it lives."""
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def ask_to_stop(self) -> None:
        self._process.send_signal(self.child.stop_signal)

    def kill(self) -> None:
        """End the process and its group; nothing if its death was seen before."""
        if self._due is None:
            kill_group(self._process.pid)
            self._process.wait()


def _spawn(child: Child, log: BinaryIO) -> subprocess.Popen[bytes]:
    account = child.account
    return subprocess.Popen(
        child.command,
        env=dict(child.env),
        cwd=child.cwd,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


class Supervisor:
    """Runs children until it is asked to stop. All but `request_stop` belongs to one thread.

    Args:
        logs: folder of the children's logs, `<name>.log`.
        on_change: called with the marks of all children after each launch.
    """

    def __init__(self, logs: Path, on_change: Callable[[tuple[ProcessMark, ...]], None]) -> None:
        self._logs = logs
        self._on_change = on_change
        self._stages: list[list[_Slot]] = []
        # Its put may be called from a signal handler that interrupted its own get.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stop_requests = 0

    def request_stop(self) -> None:
        """Ask for the end, from any thread or signal handler. Asked again: hasten, graces become 1 s."""
        self._stop_requests += 1
        self._wake()

    def start(self, *children: Child) -> bool:
        """Start one stage of children side by side and wait until all are ready.

        Returns:
            `False` if a stop was asked for meanwhile.

        Raises:
            ServerFailed: a child wasn't ready in time or kept dying; the message shows its log's end.
        """
        stage: list[_Slot] = []
        self._stages.append(stage)
        for child in children:
            stage.append(_Slot(child, self._logs / f"{child.name}.log", self._wake))
            self._announce()
        started = time.monotonic()
        waiting = stage
        while not self._stop_requests:
            self._revive()
            waiting = [slot for slot in waiting if not (slot.alive and slot.child.ready())]
            if not waiting:
                return True
            for slot in waiting:
                _check_start(slot, time.monotonic() - started)
            self._pause(_READY_POLL_SECONDS)
        return False

    def watch(self) -> None:
        """Restart what dies, until a stop is asked for."""
        while not self._stop_requests:
            self._revive()
            delays = [delay for slot in self._slots() if (delay := slot.seconds_to_launch()) is not None]
            self._pause(min(delays, default=None))

    def stop(self) -> None:
        """Stop all children, the last stage first."""
        self._stop_requests = max(1, self._stop_requests)
        for stage in reversed(self._stages):
            self._stop_stage(stage)

    def _stop_stage(self, stage: list[_Slot]) -> None:
        asked = time.monotonic()
        for slot in stage:
            slot.ask_to_stop()
        while living := [slot for slot in stage if slot.alive]:
            asked_for = time.monotonic() - asked
            left = {slot: self._grace_seconds(slot) - asked_for for slot in living}
            for slot in living:
                if left[slot] <= 0:
                    slot.kill()
            self._pause(max(0.0, min(left.values())))
        for slot in stage:
            slot.kill()

    def _grace_seconds(self, slot: _Slot) -> float:
        grace = slot.child.stop_grace_seconds
        return min(grace, _HASTENED_GRACE_SECONDS) if self._stop_requests > 1 else grace

    def _revive(self) -> None:
        revived = [slot for slot in self._slots() if slot.revive()]
        if revived:
            self._announce()

    def _announce(self) -> None:
        self._on_change(tuple(slot.mark for slot in self._slots()))

    def _slots(self) -> list[_Slot]:
        return [slot for stage in self._stages for slot in stage]

    def _wake(self) -> None:
        self._wakes.put(None)

    def _pause(self, seconds: float | None) -> None:
        """Sleep until a child dies, a stop is asked for or the time has passed."""
        try:
            self._wakes.get(timeout=seconds)
        except queue.Empty:
            return


def _check_start(slot: _Slot, waited_seconds: float) -> None:
    child = slot.child
    if slot.deaths >= _START_DEATHS:
        problem = f"{child.name} died {slot.deaths} times while starting"
    elif waited_seconds > child.ready_seconds:
        problem = f"{child.name} wasn't ready within {child.ready_seconds:g} s"
    else:
        return
    raise ServerFailed(f"{problem}. Its log is {slot.log}, which ends:\n{last_lines(slot.log)}")
