"""Real processes for acceptance tests: dispatcher and workers on the test's own database and broker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psutil
from sqlalchemy import Engine, text

from pipeline.jobs import status
from tests.acceptance.oracle import objections
from tests.support.commands import run_command

T = TypeVar("T")

_PATIENCE_SECONDS = 600.0


def eventually(look: Callable[[], T | None], what: str, seconds: float = _PATIENCE_SECONDS) -> T:
    """Poll `look` until it returns something truthy, and return that. Fail after `seconds`, a test's only clock."""
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        if seen := look():
            return seen
        # A look that takes long must not take the time of those that it waits for.
        time.sleep(min(1.0, max(0.01, 9 * (time.monotonic() - began))))
    raise AssertionError(f"not seen within {seconds:g} s: {what}")


@dataclass
class Fleet:
    """Processes that work on one database. All end with the test."""

    engine: Engine
    environment: dict[str, str]
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python module under `name`; its output goes to `logs/name.log`."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **self.environment, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def start_dispatcher(self, module: str = "pipeline.cli") -> None:
        """Start a dispatcher, from another `module` for a mutant, and wait until it is the leader."""
        self.start("dispatcher", module, "dispatcher")
        query = "select exists (select from vectormill.leases where lease_until > now())"
        eventually(lambda: self.scalar(query), "a dispatcher that leads")

    def start_worker(
        self, replicas: int = 2, app: str = "workers.runner.app", name: str = "worker", **environment: str
    ) -> None:
        """Start a worker, with another `app` for a mutant, and wait until it has registered in the database."""
        before = self.scalar("select count(*) from vectormill.workers")
        self.start(
            name,
            *("celery", "--quiet", "-A", app, "worker", "--pool", "prefork", "--concurrency", str(replicas)),
            *("--hostname", f"{name}-{time.monotonic_ns()}@test", "--without-gossip", "--without-mingle"),
            VECTORMILL_WORKER_DEVICES="cpu",
            VECTORMILL_WORKER_REPLICAS=str(replicas),
            **environment,
        )
        count = "select count(*) from vectormill.workers"
        eventually(lambda: self.scalar(count) > before, "a worker that shows itself")

    def kill(self, name: str) -> None:
        """Kill a process that `start` started, by SIGKILL."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def kill_tree(self, name: str) -> None:
        """Kill a process that `start` started and all its descendants, by SIGKILL, as when a machine dies."""
        children = psutil.Process(self.processes[name].pid).children(recursive=True)
        for child in children:
            child.suspend()  # otherwise a parent could report its child's death
        self.kill(name)
        for child in children:
            with _gone_already():
                child.kill()

    def ended_alone(self) -> list[str]:
        """Return a line for each process that has ended unasked, and forget those processes."""
        ended = {name: code for name, process in self.processes.items() if (code := process.poll()) is not None}
        for name in ended:
            del self.processes[name]
        return [f"{name} has ended by itself, with {code}" for name, code in ended.items()]

    def close(self) -> None:
        """Kill all processes, workers' children included."""
        trees = [psutil.Process(p.pid) for p in self.processes.values() if p.poll() is None]
        everyone = [child for tree in trees for child in tree.children(recursive=True)] + trees
        for process in everyone:
            with _gone_already():
                process.send_signal(signal.SIGCONT)
                process.kill()
        psutil.wait_procs(everyone, timeout=20)
        for popen in self.processes.values():
            popen.wait()

    def scalar(self, query: str, **values: Any) -> Any:
        """Return the first value of the query's first row."""
        with self.engine.begin() as connection:
            return connection.execute(text(query), values).scalar()

    def submit(self, *arguments: str) -> UUID:
        """Run `vectormill submit --no-reuse` to its end; return the job's id. Another job may have the same texts, and
        this one is to have work."""
        return UUID(self.cli("submit", "--no-reuse", *arguments).stdout.strip())

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of vectormill in this process."""
        done = run_command(*arguments, environment={**os.environ, **self.environment})
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def cli_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of vectormill in a process of its own, which several threads can do at once."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            env={**os.environ, **self.environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
        )

    def status(self, job: UUID) -> dict[str, Any]:
        """Return a job's status."""
        with self.engine.begin() as connection:
            return status.job_status(connection, job).model_dump(mode="json")

    def await_end(self, job: UUID, seconds: float = _PATIENCE_SECONDS) -> dict[str, Any]:
        """Wait for a job's end; return its status."""
        ended = "select state in ('completed', 'failed', 'cancelled') from vectormill.jobs where id = :job"
        eventually(lambda: self.scalar(ended, job=job), f"the end of job {job}", seconds)
        return self.status(job)

    def objections(self, job: UUID, corpus: Path, losses: int | None = None) -> list[str]:
        """Return the oracle's objections to a job that has ended."""
        with self.engine.begin() as connection:
            return objections(connection, job, corpus, losses=losses)

    def child_at_work(self, job: UUID, chunk: int | None = None, after: int = 0) -> tuple[psutil.Process, int, int]:
        """Wait until a chunk of `job` runs, or this `chunk` under a later fence than `after`, and return the child that
        runs it: (process, chunk, fence)."""
        query = text("""
            select c.id, c.fence, a.client_port from vectormill.chunks c
            join pg_stat_activity a on a.pid = c.backend_pid
            where c.job_id = :job and c.state = 'running' and c.fence > :after and c.id = coalesce(:chunk, c.id)
            limit 1
        """)

        def look() -> tuple[psutil.Process, int, int] | None:
            with self.engine.begin() as connection:
                row = connection.execute(query, {"job": job, "chunk": chunk, "after": after}).one_or_none()
            child = self.child_on_port(row.client_port) if row else None
            return (child, row.id, row.fence) if row and child else None

        return eventually(look, "a child at work")

    def child_on_port(self, port: int) -> psutil.Process | None:
        """Return the child of one of our processes that has a connection from this loopback port."""
        for process in self.processes.values():
            with _gone_already():
                for child in psutil.Process(process.pid).children(recursive=True):
                    with _gone_already():
                        if any(c.laddr.port == port for c in child.net_connections("tcp4")):
                            return child
        return None


def _gone_already() -> suppress:
    return suppress(psutil.NoSuchProcess, psutil.AccessDenied)
