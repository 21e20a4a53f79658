"""Supervisor of child processes: starts them in parallel, restarts those that die, stops all in reverse order."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import BinaryIO

import structlog

from pipeline.core.errors import ServerFailed
from pipeline.embedded.files import log_end, open_log
from pipeline.embedded.processes import ProcessMark, Standstill, kill_group, mark_process

#: Interval of readiness checks, with backoff: each check is a login somewhere, which costs a busy machine time.
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.1, 1.0
#: Interval of checks for a standstill; a child's end and its readiness are noticed at once.
_LOOK_SECONDS = 5.0
#: Start timeout of a child that does nothing at all; as long as it works, it may take any time.
STANDSTILL_SECONDS = 600.0
#: Restart delay (exponential backoff).
_FIRST_DELAY_SECONDS, _LAST_DELAY_SECONDS = 0.1, 5.0
#: Lifetime after which a child's restart delay is reset.
_STEADY_SECONDS = 30.0
_HASTENED_GRACE_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Child:
    """Description of a process to keep alive. It leads its own session, so a terminal's Ctrl-C doesn't reach it."""

    #: Also names its log.
    name: str
    command: tuple[str, ...]
    #: The whole environment.
    env: Mapping[str, str]
    cwd: Path
    #: Readiness check, called in a thread of its own until it returns True. It mustn't raise.
    ready: Callable[[], bool]
    #: Account that it runs as; `None`: ours.
    account: struct_passwd | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    #: Time between the stop signal and SIGKILL, which its whole process group gets.
    stop_grace_seconds: float = 60.0


class _Slot:
    """A child and its current process."""

    def __init__(self, child: Child, log: Path, wake: Callable[[], None]) -> None:
        self.child = child
        self.log = log
        self._wake = wake
        self._delay = _FIRST_DELAY_SECONDS
        self._due: float | None = None
        self._ready, self._dismissed = threading.Event(), threading.Event()
        self.launch()
        self._standstill = Standstill(self._process.pid, log)
        threading.Thread(target=self._ask_until_ready, daemon=True).start()

    def launch(self) -> None:
        try:
            with open_log(self.log) as log:
                self._log_begin = log.seek(0, os.SEEK_END)
                self._process = _spawn(self.child, log)
        except OSError as error:
            raise ServerFailed(f"{self.child.name} can't be started: {error}") from error
        self._due = None
        self._launched = time.monotonic()
        # Marked before it is waited for, since until then no other process can get its pid.
        self.mark = mark_process(self.child.name, self._process.pid, self.child.stop_signal)
        threading.Thread(target=self._reap, args=(self._process,), daemon=True).start()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._wake()

    def _ask_until_ready(self) -> None:
        delay = _FIRST_POLL_SECONDS
        while not self._dismissed.wait(delay):
            if self.child.ready():
                self._ready.set()
                self._wake()
                return
            delay = min(1.5 * delay, _LAST_POLL_SECONDS)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def has_been_ready(self) -> bool:
        return self._ready.is_set()

    def check_start(self, standstill_seconds: float) -> None:
        """Raise `ServerFailed` if the child, which isn't ready yet, died or did nothing for `standstill_seconds`."""
        if not self.alive:
            problem = f"{_ending(self._process.returncode)} before it was ready"
        elif (still_seconds := self._standstill.seconds()) > standstill_seconds:
            problem = f"isn't ready, and has done nothing for {still_seconds:,.0f} s"
        else:
            return
        raise ServerFailed(f"{self.child.name} {problem}. {log_end(self.log, self._log_begin)}")

    def revive(self) -> bool:
        """Restart the process if it died and the delay has passed. Return True if it was restarted.

        A child that has never been ready isn't restarted.
        """
        if self.alive or not self.has_been_ready:
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
        """Return the time until the restart; `None` if no restart is due."""
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def ask_to_stop(self) -> None:
        self._dismissed.set()
        self._process.send_signal(self.child.stop_signal)

    def kill(self) -> None:
        """Kill the process and its group, unless that was done when it died."""
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


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Supervisor:
    """Supervisor that runs children until a stop is requested. Only `request_stop` may be called by other threads.

    Args:
        logs: folder of the children's logs, `<name>.log`.
        on_change: called with the marks of all children after each launch.
        on_wait: called with the names of the children that it waits for, to be ready or to end, when they change.
        standstill_seconds: time for which a child that isn't ready may do nothing at all.
    """

    def __init__(
        self,
        logs: Path,
        on_change: Callable[[tuple[ProcessMark, ...]], None] = lambda _: None,
        on_wait: Callable[[tuple[str, ...]], None] = lambda _: None,
        *,
        standstill_seconds: float = STANDSTILL_SECONDS,
    ) -> None:
        self._logs = logs
        self._on_change = on_change
        self._on_wait = on_wait
        self._standstill_seconds = standstill_seconds
        self._waiting_for: tuple[str, ...] = ()
        self._stages: list[list[_Slot]] = []
        # SimpleQueue, since a signal handler may call `put` while it interrupts `get` (reentrant).
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stop_requests = 0

    def request_stop(self) -> None:
        """Request a stop, from any thread or signal handler. A second request shortens the graces to 1 s."""
        self._stop_requests += 1
        self._wake()

    def launch(self, *children: Child) -> None:
        """Start one stage of children in parallel, without waiting until they are ready.

        Raises:
            ServerFailed: a program can't be run.
        """
        stage: list[_Slot] = []
        self._stages.append(stage)
        for child in children:
            stage.append(_Slot(child, self._logs / f"{child.name}.log", self._wake))
            self._announce()

    def wait_until_ready(self) -> bool:
        """Wait until all launched children have been ready, as long as each is alive and does something.

        Returns:
            `False` if a stop was requested in the meantime.

        Raises:
            ServerFailed: a child died, or did nothing for too long; the message shows its log's end.
        """
        while not self._stop_requests:
            self._revive()
            waiting = [slot for slot in self._slots() if not slot.has_been_ready]
            self._say(waiting)
            if not waiting:
                return True
            for slot in waiting:
                slot.check_start(self._standstill_seconds)
            self._pause(min(_LOOK_SECONDS, self._standstill_seconds))
        return False

    def watch(self) -> None:
        """Restart children that die, until a stop is requested."""
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
            self._say(living)
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

    def _say(self, waiting: Sequence[_Slot]) -> None:
        names = tuple(slot.child.name for slot in waiting)
        if names != self._waiting_for:
            self._waiting_for = names
            self._on_wait(names)

    def _slots(self) -> list[_Slot]:
        return [slot for stage in self._stages for slot in stage]

    def _wake(self) -> None:
        self._wakes.put(None)

    def _pause(self, seconds: float | None) -> None:
        """Sleep until a child is ready or dies, a stop is requested, or the time has passed."""
        try:
            self._wakes.get(timeout=seconds)
        except queue.Empty:
            return
