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
from collections.abc import Callable

import structlog

log = structlog.get_logger()

_ENDS = {signal.SIGTERM, signal.SIGINT}
#: A child that dies at once doesn't keep the processor busy.
_LEAST_LIFE_SECONDS = 1.0


def serve_in_child(serve: Callable[[socket.socket], None], listener: socket.socket) -> None:
    """Run `serve` in a child, and in another one when a signal ends that: for want of memory, or a crash in a library.

    Returns in a child that has served; the parent exits with what its last child ended with. SIGTERM and SIGINT ask the
    child to end, and close the door to others. It dies with its parent.
    """
    reading, writing = os.pipe()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # where it is ignored it can't be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDS, signal.SIGCHLD})
    # What is shared with children stays shared.
    gc.collect()
    gc.freeze()
    while True:
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.close(writing)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_ENDS, signal.SIGCHLD})
            threading.Thread(target=_die_with_parent, args=(reading,), name="parent", daemon=True).start()
            serve(listener)
            return
        code, is_asked = _wait(child, listener)
        if code >= 0 or is_asked:
            sys.exit(max(0, code))
        log.error("child_died", signal=signal.Signals(-code).name)
        time.sleep(max(0.0, _LEAST_LIFE_SECONDS - (time.monotonic() - began)))


def _wait(child: int, listener: socket.socket) -> tuple[int, bool]:
    """What a child ends with, and whether it was asked to end."""
    is_asked = False
    while True:
        if signal.sigwait({*_ENDS, signal.SIGCHLD}) in _ENDS:
            is_asked = True
            listener.close()
            os.kill(child, signal.SIGTERM)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), is_asked


def _die_with_parent(pipe: int) -> None:
    """Nothing is ever written: it ends when the parent does."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)
