"""Metrics endpoint of a process, for Prometheus.

A worker's metrics are those of all its processes together: each process writes to files of its own in one folder, which
belongs to one run of the worker.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pipeline.infra import metrics

log = structlog.get_logger()

CONTENT_TYPE = CONTENT_TYPE_LATEST
#: Variable that prometheus_client reads when it is imported; from then on it keeps values in this folder.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "vectormill-metrics-"
#: Stands for the pid in the names of files that hold the counts of dead processes.
_GONE = "gone"
#: Lock file that is held for as long as the folder's worker lives.
_LOCK = "lock"


def page(process: metrics.Process) -> bytes:
    """Return a process' metrics as `/metrics` answers them."""
    return generate_latest(process.registry)


def serve(process: metrics.Process, host: str, port: int | None) -> None:
    """Serve this process' metrics at a port of their own, in a thread; 0 picks a free port, `None` serves nothing.

    If the port can't be opened, that is logged, and the process works on without metrics.
    """
    if port is None:
        return
    try:
        server, _ = start_http_server(port, host, _registry(process))
    except OSError as error:
        log.error("metrics_not_served", host=host, port=port, error=os.strerror(error.errno or 0))
    else:
        log.info("metrics_served", host=host, port=server.server_port)


def _registry(process: metrics.Process) -> CollectorRegistry:
    folder = os.environ.get(FOLDER_VARIABLE)
    return process.registry if folder is None else of_folder(process, Path(folder))


def of_folder(process: metrics.Process, folder: Path) -> CollectorRegistry:
    """Return a registry that sums what processes of one kind have written to a folder."""
    registry = CollectorRegistry()
    registry.register(_Together(folder, process.name))
    return registry


class _Together(Collector):
    """Collector of the metrics that several processes of one kind have written to a folder."""

    def __init__(self, folder: Path, process: str) -> None:
        self._folder = folder
        self._files = MultiProcessCollector(None, str(folder))
        self._prefix = f"vectormill_{process}_"
        #: Each scrape has a thread of its own; none may read while another moves counts.
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return the counts of all processes, dead or alive, and the gauges of those that live."""
        with self._lock:
            for file in self._folder.glob("*.db"):
                kind, _, pid = file.stem.rpartition("_")
                if pid != _GONE and not psutil.pid_exists(int(pid)):
                    self._take_over(file, kind)
            # The files also hold the label-free metrics of other kinds of processes, which are empty.
            return [found for found in self._files.collect() if found.name.startswith(self._prefix)]

    def _take_over(self, file: Path, kind: str) -> None:
        """Add a dead process' counts to those of earlier dead processes, and drop its gauges."""
        if file.stat().st_size and not kind.startswith("gauge"):
            counts = list(MmapedDict.read_all_values_from_file(file))
            whole = MmapedDict(str(self._folder / f"{kind}_{_GONE}.db"))
            for key, count, moment, _ in counts:
                whole.write_value(key, whole.read_value(key)[0] + count, moment)
            whole.close()
        file.unlink()


def make_folder() -> Path:
    """Create a folder, locked until this process ends, also if it becomes another program (exec).

    Folders that killed workers have left behind are removed.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Others see the lock file only once it is held.
    (folder / ".lock").rename(folder / _LOCK)
    os.set_inheritable(lock, True)
    return folder


def _remove_if_left(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def remove_folder() -> None:
    """Delete the folder when the worker ends."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        shutil.rmtree(folder, ignore_errors=True)
