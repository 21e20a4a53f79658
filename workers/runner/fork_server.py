"""Fork server of a worker: a process that imports torch once and opens nothing, and forks the worker's children.

Importing sentence-transformers takes seven seconds of CPU and 400 MB. A forked child has it at once, and shares the
memory. The worker itself can't be forked: it has threads and connections.
"""

import os
import sys
from contextlib import suppress
from typing import Any

import billiard
from billiard import forkserver, popen_forkserver
from billiard.connection import arbitrary_address
from celery.concurrency import asynpool

#: Limit of a socket's path, less its closing NUL.
_MOST_PATH_BYTES = 107


class _PoolWorker(asynpool.Worker):
    """Child of the pool that tells the parent which pipe it is ready to read from by the parent's number of it. A
    forked child's own number is another one, and the parent would never send it a second task."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"inqW_fd": self.inqW_fd})


class _Popen(popen_forkserver.Popen):
    """Child that a new server forks where the old one has died, which has killed all its children.

    Whether it is dead shows only here: while its threads end it may still have files open, and take a connection.
    """

    def _launch(self, process_obj: Any) -> None:
        try:
            super()._launch(process_obj)
        except (OSError, EOFError):
            self._fds.clear()
            _restart()
            super()._launch(process_obj)


def start() -> None:
    """Let children be forked by a server, and start it.

    Children are new processes, which import for themselves, on macOS, since Metal can't be opened after a fork, and
    where the path of temporary files is too long for a socket.
    """
    os.environ["FORKED_BY_MULTIPROCESSING"] = "1"  # Celery then binds tasks to the app that a child receives
    if sys.platform == "darwin" or len(arbitrary_address("AF_UNIX")) > _MOST_PATH_BYTES:
        billiard.set_start_method("spawn", force=True)
        return
    asynpool.AsynPool.Worker = _PoolWorker
    popen_forkserver.Popen = _Popen
    billiard.set_start_method("forkserver", force=True)
    forkserver.set_forkserver_preload(["workers.runner.preloaded"])
    forkserver.ensure_running()


def _restart() -> None:
    server = forkserver._forkserver
    if (pipe := server._forkserver_alive_fd) is not None:
        server._forkserver_alive_fd = None
        with suppress(OSError):
            os.close(pipe)
    server.ensure_running()
