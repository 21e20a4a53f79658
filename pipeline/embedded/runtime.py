"""Record of the `up` that runs for a home, `<home>/run/up.json`, and the lock that admits one supervisor per home."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import UserError
from pipeline.embedded.files import make_folder, naming_the_home, write_private
from pipeline.embedded.processes import ProcessMark, boot_id, find_process, stop_process

_LEFTOVER_GRACE_SECONDS = 60.0


class Running(BaseModel):
    """Record of a home's `up`, for other processes."""

    model_config = ConfigDict(frozen=True)

    #: The home it was started for, so that a copied home doesn't claim the processes of the original.
    home: Path
    supervisor_pid: int
    #: The supervisor's start, seconds since the machine's, and which run of the machine that is.
    supervisor_started: float
    boot: str = Field(default_factory=boot_id)
    database_url: str = Field(repr=False)
    redis_url: str = Field(repr=False)
    api_url: str
    #: Empty until the database is ready.
    api_key: str = Field(default="", repr=False)
    #: Without credentials; the user is `vectormill`.
    flower_url: str
    flower_password: str = Field(repr=False)
    #: Ports on loopback of the children's metrics, by the children's names; the api serves its own at its port.
    metrics_ports: dict[str, int] = Field(default_factory=dict)
    #: True once all children have been ready, until a stop is requested.
    ready: bool
    stopping: bool = False
    #: Names of the things that the start or the stop waits for.
    waiting_for: tuple[str, ...] = ()
    children: tuple[ProcessMark, ...]

    @property
    def metrics_urls(self) -> list[str]:
        """URLs of the metrics of all processes."""
        ports = self.metrics_ports.values()
        return [f"{self.api_url}/metrics", *(f"http://127.0.0.1:{port}/metrics" for port in ports)]

    @property
    def supervisor(self) -> ProcessMark:
        """The supervisor's own mark."""
        return ProcessMark(name="up", pid=self.supervisor_pid, started=self.supervisor_started)


def write_running(running: Running) -> None:
    """Write the record, with mode 0600 because it holds the passwords."""
    write_private(_record(running.home), running.model_dump_json())


def forget_running(home: Path) -> None:
    """Remove the record when nothing runs any more."""
    _record(home).unlink(missing_ok=True)


def read_running(home: Path) -> Running | None:
    """Return the home's record, even if its processes are dead; `None` if there is no valid record of this home since
    the machine started.

    Raises:
        UserError: it can't be read.
    """
    record = _record(home)
    with naming_the_home(record):
        try:
            text = record.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        running = Running.model_validate_json(text)
    except ValidationError:
        return None
    return running if running.home.resolve() == home.resolve() and running.boot == boot_id() else None


def find_running(home: Path) -> Running | None:
    """Return the home's record if its supervisor is alive."""
    running = read_running(home)
    return running if running and find_process(running.supervisor) else None


@contextmanager
def hold_home(home: Path) -> Iterator[None]:
    """Hold the home's lock for the length of the block, as its only supervisor.

    Raises:
        UserError: another process holds it.
    """
    descriptor = _lock(make_folder(home / "run") / "lock", home)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, home: Path) -> int:
    while True:
        with naming_the_home(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            make_folder(path.parent)  # the last holder has deleted the home's data, and the lock with it
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"vectormill already runs for {home}; stop it with: vectormill down") from None
        os.close(descriptor)


def stop_leftovers(home: Path) -> int:
    """Stop the processes that a dead supervisor left behind, and return their number. The caller holds the home."""
    running = read_running(home)
    leftovers = [mark for mark in running.children if find_process(mark)] if running else []
    for mark in reversed(leftovers):
        stop_process(mark, _LEFTOVER_GRACE_SECONDS)
    forget_running(home)
    return len(leftovers)


def _record(home: Path) -> Path:
    return home / "run" / "up.json"
