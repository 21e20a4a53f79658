"""Successor of a Postgres server, which takes its place without its last commits: a promoted standby or a restored
base backup.

The server's own programs do it: `pg_basebackup`, `pg_ctl promote`. The successor serves at the same address, as one
behind a name or a pooler does. Sources: PostgreSQL's documentation, "Log-Shipping Standby Servers" and "Continuous
Archiving and Point-in-Time Recovery".
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg

from pipeline.embedded.processes import processes_in
from tests.acceptance.fleet import eventually
from tests.support.lines import Line, at_port, line_to
from tests.support.ports import free_port

_START_SECONDS = 120.0


@dataclass
class Successor:
    """Copy of a running server's data, made ready to take its place."""

    #: Process of the running server, under a supervisor that starts it again when it dies.
    primary: psutil.Process
    #: URL of the server for its owner.
    url: str
    folder: Path = field(init=False)
    _process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self._data = Path(self.primary.cwd())
        self._programs = Path(self.primary.exe()).parent
        self._command = self.primary.cmdline()
        self.folder = self._data.with_name("successor")
        uids, gids = self.primary.uids(), self.primary.gids()
        self._as: dict[str, Any] = {"user": uids.real, "group": gids.real, "extra_groups": []}
        if os.geteuid() != 0:
            self._as = {}

    def back_up(self, port: int) -> None:
        """Take a base backup through a port, with the data as they are at its end."""
        login = urlsplit(self.url)
        where = ("-h", "127.0.0.1", "-p", str(port), "-U", str(login.username), "-D", str(self.folder))
        moved = [f"--tablespace-mapping={old}={self._own(self._next_to(old))}" for old in self._tablespaces()]
        self._own(self.folder)
        self._run("pg_basebackup", *where, "-R", "-c", "fast", "-X", "stream", *moved, PGPASSWORD=str(login.password))

    @contextmanager
    def standing_by(self) -> Iterator[Line]:
        """Run the copy as a streaming standby that follows the primary through a line."""
        primary_port = urlsplit(self.url).port
        assert primary_port
        with line_to("127.0.0.1", primary_port, Line) as line:
            self.back_up(line.port)
            port = str(free_port())
            command = [f"port={port}" if part.startswith("port=") else part for part in self._command]
            command[command.index("-D") + 1] = str(self.folder)
            with (self.folder / "standby.log").open("wb") as log:
                self._process = subprocess.Popen(
                    command, cwd=self.folder, env={"LC_ALL": "C"}, stdout=log, stderr=log, **self._as
                )
            eventually(lambda: self._follows(at_port(self.url, int(port))), "a standby that follows", _START_SECONDS)
            try:
                yield line
            finally:
                if self._process:
                    self._end(self.folder)

    def _follows(self, url: str) -> bool:
        """Return True if the standby has all that the primary had a moment ago."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            (now,) = connection.execute("select pg_current_wal_lsn()").fetchone() or (None,)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                query = "select pg_last_wal_receive_lsn() >= %s and exists (select from pg_stat_wal_receiver)"
                (follows,) = connection.execute(query, (now,)).fetchone() or (False,)
        except psycopg.OperationalError:
            return False
        return bool(follows)

    def lose_primary(self) -> None:
        """Kill the primary and all its backends, and take away its data, so that its supervisor can't restart it."""
        self._data.rename(self._lost)
        self._own(self._data)
        self.primary.kill()
        self._end(self._lost)

    def promote(self) -> None:
        """Promote the standby, so that it takes writes on a new timeline."""
        self._run("pg_ctl", "promote", "-w", "-D", str(self.folder), "-t", str(int(_START_SECONDS)))

    def take_place(self) -> None:
        """Move the copy to the primary's place, where the supervisor starts it."""
        if self._process:
            self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.folder), "-t", str(int(_START_SECONDS)))
            self._process.wait()
            self._process = None
        for name in ("standby.signal", "standby.log"):  # left over from a backup that wasn't promoted
            (self.folder / name).unlink(missing_ok=True)
        # Renamed onto the empty folder, so that at no moment the supervisor lacks a folder to start in.
        self.folder.rename(self._data)
        for place in (self._lost, *(Path(old) for old in self._old_tablespaces)):
            shutil.rmtree(place, ignore_errors=True)

    @property
    def _lost(self) -> Path:
        return self._data.with_name("lost")

    def _tablespaces(self) -> list[str]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            query = "select pg_tablespace_location(oid) from pg_tablespace where pg_tablespace_location(oid) <> ''"
            self._old_tablespaces = [row[0] for row in connection.execute(query)]
        return self._old_tablespaces

    @staticmethod
    def _next_to(old: str) -> Path:
        """Return the next place of a tablespace: `used`, `used-1`, `used-2` and so on."""
        name, _, number = Path(old).name.partition("-")
        return Path(old).with_name(f"{name}-{int(number or 0) + 1}")

    def _own(self, folder: Path) -> Path:
        """Make an empty folder that belongs to the server's account; return its path."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        if self._as:
            os.chown(folder, self._as["user"], self._as["group"])
        return folder

    def _end(self, data: Path) -> None:
        """Kill all processes that work on this data, and wait for their end."""

        def ended() -> bool:
            left = processes_in(data, "postgres")
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return not left

        eventually(ended, "the end of all its processes", 60)

    def _run(self, program: str, *arguments: str, **environment: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd="/",
            env={"LC_ALL": "C", **environment},
            capture_output=True,
            check=False,
            **self._as,
        )
        assert done.returncode == 0, f"{program}: {done.stderr.decode()[-500:]}"
