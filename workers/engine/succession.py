"""A server that is replaced at once when something kills it: its parent has imported what takes long, and opens no
device.

The parent holds the listening socket, so whoever connects meanwhile waits and isn't refused.
"""

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

#: Calls with the listening socket, and how many children were killed before this one.
Serve = Callable[[socket.socket, int], None]

log = structlog.get_logger()

_ENDS = {signal.SIGTERM, signal.SIGINT}
#: A child that dies at once doesn't keep the processor busy.
_LEAST_LIFE_SECONDS = 1.0
#: When more have died in so long, whoever watches the parent must know.
_MOST_DEATHS, _WITHIN_SECONDS = 3, 600.0
#: A child that was asked to end is asked again so often.
_ASK_SECONDS = 1.0


def hold_signals() -> None:
    """Let SIGTERM and SIGINT wait until there is a child: before the first thread, which would get them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


def serve_in_child(serve: Serve, listener: socket.socket) -> None:
    """Run `serve` in a child, and in another one when a signal ends that: for want of memory, or a crash in a library.

    Returns in a child that has served; the parent exits with what its last child ended with. SIGTERM and SIGINT ask the
    child to end, and close the door to others. It dies with its parent. macOS has no such children: Metal can't be
    opened after a fork.
    """
    if sys.platform == "darwin":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        serve(listener, 0)
        return
    reading, writing = os.pipe()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # where it is ignored it can't be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDS, signal.SIGCHLD})
    # What is shared with children stays shared.
    gc.collect()
    gc.freeze()
    deaths = 0
    latest: deque[float] = deque(maxlen=_MOST_DEATHS + 1)
    while True:
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.close(writing)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_ENDS, signal.SIGCHLD})
            threading.Thread(target=_die_with_parent, args=(reading,), name="parent", daemon=True).start()
            serve(listener, deaths)
            return
        code, is_asked = _wait(child, listener)
        if code >= 0 or is_asked:
            sys.exit(max(0, code))
        log.error("child_died", signal=signal.Signals(-code).name)
        deaths += 1
        latest.append(died := time.monotonic())
        if len(latest) > _MOST_DEATHS and died - latest[0] < _WITHIN_SECONDS:
            sys.exit(128 - code)
        time.sleep(max(0.0, began + _LEAST_LIFE_SECONDS - died))


def _wait(child: int, listener: socket.socket) -> tuple[int, bool]:
    """Return a child's exit code, and whether it was asked to end."""
    is_asked = False
    while True:
        told = signal.sigtimedwait({*_ENDS, signal.SIGCHLD}, _ASK_SECONDS)
        if told and told.si_signo in _ENDS:
            is_asked = True
            listener.close()
        if is_asked:  # again and again: a server that is just starting may miss one
            os.kill(child, signal.SIGTERM)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), is_asked


def _die_with_parent(pipe: int) -> None:
    """Nothing is ever written: it ends when the parent does."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)
