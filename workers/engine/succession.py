"""Supervisor of a server: a parent process that replaces the server at once when something kills it.

The parent has imported the slow libraries, and opens no device. It holds the listening socket, so clients that connect
meanwhile wait and aren't refused.
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

#: Function that serves, given the listening socket and the number of children killed before.
Serve = Callable[[socket.socket, int], None]

log = structlog.get_logger()

_ENDS = {signal.SIGTERM, signal.SIGINT}
#: Minimum time between two children, so that one that dies at once doesn't keep the processor busy.
_LEAST_LIFE_SECONDS = 1.0
#: Limit of deaths within a window; beyond it the parent exits, so that its own supervisor notices.
_MOST_DEATHS, _WITHIN_SECONDS = 3, 600.0
#: Interval at which a child that was asked to end is asked again.
_ASK_SECONDS = 1.0


def hold_signals() -> None:
    """Block SIGTERM and SIGINT until there is a child. Call before the first thread starts, or it would get them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


def serve_in_child(serve: Serve, listener: socket.socket) -> None:
    """Run `serve` in a child, and in a new one when a signal kills it: out of memory, or a crash in a library.

    Return in a child that has served; the parent exits with its last child's exit code. SIGTERM and SIGINT close the
    listening socket and ask the child to end. A child dies with its parent. On macOS there is no child, since Metal
    can't be opened after a fork.
    """
    if sys.platform == "darwin":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        serve(listener, 0)
        return
    reading, writing = os.pipe()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored SIGCHLD can't be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDS, signal.SIGCHLD})
    # Keep memory pages shared with children: collections would write to them.
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
    """Wait for a child. Return its exit code, and True if it was asked to end."""
    is_asked = False
    while True:
        told = signal.sigtimedwait({*_ENDS, signal.SIGCHLD}, _ASK_SECONDS)
        if told and told.si_signo in _ENDS:
            is_asked = True
            listener.close()
        if is_asked:  # repeatedly: a server that is just starting may miss a signal
            os.kill(child, signal.SIGTERM)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), is_asked


def _die_with_parent(pipe: int) -> None:
    """Kill this process when its parent ends. Nothing is ever written to the pipe, so reading returns only then."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)
