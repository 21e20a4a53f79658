"""The record of what runs for a home, `<home>/run/up.json`, and the lock that lets one supervisor in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import UserError
from pipeline.embedded.files import make_folder, naming_the_home, write_private
from pipeline.embedded.processes import ProcessMark, find_process, stop_process

_LEFTOVER_GRACE_SECONDS = 60.0


class Running(BaseModel):
    """The `up` of a home, as other processes find it."""

    model_config = ConfigDict(frozen=True)

    #: The home it was started for: a copied home must not claim the processes of the original.
    home: Path
    supervisor_pid: int
    #: The supervisor's create time, seconds since 1970.
    supervisor_started: float
    database_url: str = Field(repr=False)
    redis_url: str = Field(repr=False)
    api_url: str
    #: Empty until the database is ready.
    api_key: str = Field(default="", repr=False)
    #: Without credentials; the user is `vectormill`.
    flower_url: str
    flower_password: str = Field(repr=False)
    #: Ports of loopback at which children show their metrics, by their names; the api does so at its own.
    metrics_ports: dict[str, int] = Field(default_factory=dict)
    #: Whether all children have been ready, and no stop was asked for since.
    ready: bool
    stopping: bool = False
    #: What the start or the stop waits for.
    waiting_for: tuple[str, ...] = ()
    children: tuple[ProcessMark, ...]

    @property
    def metrics_urls(self) -> list[str]:
        """Where the metrics of each process are."""
        ports = self.metrics_ports.values()
        return [f"{self.api_url}/metrics", *(f"http://127.0.0.1:{port}/metrics" for port in ports)]

    @property
    def supervisor(self) -> ProcessMark:
        """The supervisor's own mark."""
        return ProcessMark(name="up", pid=self.supervisor_pid, created=self.supervisor_started)


def write_running(running: Running) -> None:
    """Record what runs, mode 0600: it holds the passwords."""
    write_private(_record(running.home), running.model_dump_json())


def forget_running(home: Path) -> None:
    """Remove the record: nothing runs any more."""
    _record(home).unlink(missing_ok=True)


def read_running(home: Path) -> Running | None:
    """Return the home's record, whether or not its processes live; `None` if there is none of this home.

    Raises:
        UserError: it isn't ours to read.
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
    return running if running.home.resolve() == home.resolve() else None


def find_running(home: Path) -> Running | None:
    """Return the record of a supervisor that really lives."""
    running = read_running(home)
    return running if running and find_process(running.supervisor) else None


@contextmanager
def hold_home(home: Path) -> Iterator[None]:
    """Be the home's only supervisor for the length of the block.

    Raises:
        UserError: another one is.
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
            make_folder(path.parent)  # whoever held it has deleted the home's data, and the lock with it
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"vectormill already runs for {home}; stop it with: vectormill down") from None
        os.close(descriptor)


def stop_leftovers(home: Path) -> int:
    """Stop what a dead supervisor left behind; return how many processes. The home must be held."""
    running = read_running(home)
    leftovers = [mark for mark in running.children if find_process(mark)] if running else []
    for mark in reversed(leftovers):
        stop_process(mark, _LEFTOVER_GRACE_SECONDS)
    forget_running(home)
    return len(leftovers)


def _record(home: Path) -> Path:
    return home / "run" / "up.json"
