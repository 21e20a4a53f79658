"""Site of a drill: servers of its own, and on them the processes as operators run them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx2 as httpx
import psutil
import psycopg
from psycopg import sql
from sqlalchemy import RowMapping, text
from sqlalchemy.exc import DBAPIError

from pipeline.api import transfers
from pipeline.api.database import AT_ONCE
from pipeline.catalog.models import add_model
from pipeline.db.database import is_connection_lost, is_without_room, make_engine
from pipeline.db.migrate import upgrade
from pipeline.dispatch import background
from pipeline.embedded.place import Place
from pipeline.embedded.runtime import read_running
from tests.acceptance import witness
from tests.acceptance.counts import COUNTERS, counts_below, tokens_embedded
from tests.acceptance.fleet import Fleet, eventually
from tests.chaos.disk import Disk, small_disk
from tests.chaos.store_line import StoreLine
from tests.chaos.wire import Wire
from tests.support.lines import Line, at_port, line_to
from tests.support.machines import remove_what_root_keeps, running_servers
from tests.support.models import bundled_folder, described, static_folder
from tests.support.object_store import environment_of, s3_server
from tests.support.ports import free_port
from tests.support.roles import logins
from tests.support.scripted_gateway import ScriptedGateway, scripted_gateway

T = TypeVar("T")

BUCKET = "vectors"
#: Dispatchers and workers. A worker has two children.
DISPATCHERS = ("dispatcher-1", "dispatcher-2")
WORKERS = ("worker-1", "worker-2")
#: Model that some texts harm, and its only worker, which no other fault strikes.
BRITTLE = "brittle"
FLOWER_PASSWORD = "sesame-of-the-drill"
GATEWAY_KEY = "sk-key-of-the-drill"
_REPLICAS = 2
_DISK_BYTES = 2 * 1024**3
_PATIENCE_SECONDS = 120.0
#: Limit for a worker's start, which takes a minute or two beside a fleet that keeps every core busy.
START_SECONDS = 300.0


@dataclass
class Site:
    """Installation under drill, and the places where it can be struck."""

    fleet: Fleet
    folder: Path
    home: Path
    #: Lines through which workers reach Postgres, Redis and the object store.
    wire: Wire
    redis_line: Line
    store_line: StoreLine
    redis_url: str
    gateway: ScriptedGateway
    lease_seconds: float
    #: Database URLs by process: each logs in with just the rights that it needs. Commands use the owner's URL.
    logins: dict[str, str]
    models: tuple[str, ...]
    api_url: str
    flower_url: str
    #: Ports of the dispatchers, by name.
    metrics_ports: dict[str, int]
    #: Key of an administrator.
    api_key: str = ""
    #: Disks of Postgres' tables and of Parquet output, where disks can be mounted.
    tables: Disk | None = None
    parquet: Disk | None = None
    #: Number of workers that were killed, and so couldn't clean up.
    killed: int = 0
    #: Counter that grows when Postgres is about to go on from an earlier state, and again when it does.
    rewinds: int = 0
    #: Counter files of workers' children, as hard links that outlive them.
    kept: dict[str, Path] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start one of the dispatchers or workers, as an operator's service manager would."""
        if name in DISPATCHERS:
            environment = {
                "VECTORMILL_DATABASE_URL": self.logins["dispatcher"],
                "VECTORMILL_METRICS_PORT": str(self.metrics_ports[name]),
            }
            self.fleet.start(name, "pipeline.cli", "dispatcher", **environment)
        else:
            self.start_worker(name)

    def start_worker(self, name: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a worker."""
        models = (part for model in self.models if model != BRITTLE for part in ("--model", model))
        command = ("pipeline.cli", "worker", "--devices", "cpu", "--replicas", str(_REPLICAS), *models)
        return self.fleet.start(name, *command, **self.worker_environment, **environment)

    @property
    def worker_environment(self) -> dict[str, str]:
        """Environment that leads a worker's connections through the lines that can be struck."""
        return {
            "VECTORMILL_DATABASE_URL": at_port(self.logins["worker"], self.wire.port),
            "VECTORMILL_REDIS_URL": at_port(self.fleet.environment["VECTORMILL_REDIS_URL"], self.redis_line.port),
            "VECTORMILL_METRICS_PORT": "0",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store_line.port}",
        }

    @property
    def sources(self) -> tuple[str, ...]:
        """Places where the api may read files."""
        return str(self.folder / "parquet"), f"s3://{BUCKET}"

    @property
    def slots(self) -> int:
        """Number of chunks that run at a time."""
        return _REPLICAS * len(WORKERS)

    def start_all(self) -> None:
        """Start all processes, and wait until all serve."""
        self._start_apis()
        self.start_missing()
        self.await_workers()
        if BRITTLE in self.models:
            self.fleet.start_worker(
                name=BRITTLE,
                app="tests.acceptance.mutants",
                MUTANT="poisonable",
                VECTORMILL_DATABASE_URL=self.logins["worker"],
                VECTORMILL_WORKER_MODELS=BRITTLE,
                PROMETHEUS_MULTIPROC_DIR=counts_below(self.folder / "tmp"),
            )

    def start_missing(self) -> None:
        """Start the dispatchers and workers that are missing, as an operator's service manager would."""
        for name in (*DISPATCHERS, *WORKERS):
            if name not in self.fleet.processes:
                self.start(name)

    def await_workers(self) -> None:
        """Wait until each worker has registered since its start."""
        for name in WORKERS:
            eventually(partial(self._is_shown, name), f"{name}, which has started", START_SECONDS)

    def await_dispatchers(self) -> None:
        """Wait until each dispatcher leads, or stands by."""
        for port in self.metrics_ports.values():
            url = f"http://127.0.0.1:{port}/metrics"
            eventually(partial(_answers, url), f"an answer from {url}", START_SECONDS)

    def worker_id(self, name: str) -> UUID | None:
        """Return a worker's id as soon as Celery runs: it derives from the Celery hostname, new at each start."""
        command = psutil.Process(self.fleet.processes[name].pid).cmdline()
        if "--hostname" not in command:
            return None
        return uuid5(NAMESPACE_URL, f"vectormill-worker:{command[command.index('--hostname') + 1]}")

    def _is_shown(self, name: str) -> bool:
        query = "select exists (select from vectormill.workers where id = :id)"
        worker = self.worker_id(name)
        return worker is not None and bool(self.scalar(query, id=worker))

    def end_worker(self, name: str) -> tuple[str, ...]:
        """Ask a worker to end, and forget it. Return what is wrong with its end."""
        self.keep_counts()
        process = self.fleet.processes[name]
        process.terminate()
        try:
            code = process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.fleet.kill_tree(name)
            self.killed += 1
            return (f"{name} doesn't end",)
        del self.fleet.processes[name]
        return (f"{name} ended with {code}",) if code else ()

    def _start_apis(self) -> None:
        self.api_key = self.fleet.cli("keys", "create", "--name", "drill", "--admin").stdout.strip()
        api, flower = (str(urlsplit(url).port) for url in (self.api_url, self.flower_url))
        environment = {
            "VECTORMILL_DATABASE_URL": self.logins["api"],
            "VECTORMILL_API_SOURCES": ",".join(self.sources),
        }
        self.fleet.start("api", "pipeline.cli", "api", "--port", api, **environment)
        secret = {"VECTORMILL_FLOWER_PORT": flower, "VECTORMILL_FLOWER_PASSWORD": FLOWER_PASSWORD}
        self.fleet.start("flower", "pipeline.cli", "flower", **secret)
        for url in (f"{self.api_url}/healthz", f"{self.flower_url}/healthcheck"):
            eventually(partial(_answers, url), f"an answer from {url}")

    @property
    def owner_url(self) -> str:
        """URL of Postgres for its owner."""
        return self.fleet.environment["VECTORMILL_DATABASE_URL"]

    @property
    def owner_port(self) -> int:
        """Port of Postgres for its owner."""
        return urlsplit(self.owner_url).port or 0

    @contextmanager
    def rewinding(self) -> Iterator[None]:
        """Count a rewind: within the block, Postgres goes back to an earlier state."""
        self.rewinds += 1
        yield
        self.rewinds += 1

    def server(self, name: str) -> psutil.Process:
        """Return the process of `postgres` or `valkey` that runs now."""

        def look() -> psutil.Process | None:
            running = read_running(self.home)
            for mark in running.children if running else ():
                with suppress(psutil.NoSuchProcess):
                    if mark.name == name:
                        return psutil.Process(mark.pid)
            return None

        return eventually(look, f"a {name} that runs")

    def rows(self, query: str, **values: Any) -> list[RowMapping]:
        """Return a query's rows; retry while the database is away."""

        def ask() -> list[RowMapping]:
            with self.fleet.engine.begin() as connection:
                return list(connection.execute(text(query), values).mappings())

        return self.insist(ask)

    def scalar(self, query: str, **values: Any) -> Any:
        """Return the first value of a query's first row; retry while the database is away."""
        rows = self.rows(query, **values)
        return next(iter(rows[0].values())) if rows else None

    def insist(self, do: Callable[[], T]) -> T:
        """Call `do`, and retry while the database is away or has no room."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return do()
            except (DBAPIError, psycopg.Error) as error:
                passes = is_connection_lost(error) or is_without_room(error)
                if not passes or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def keep_counts(self) -> None:
        """Link the counter files of workers' children, so that they outlive the worker's folder."""
        for file in (self.folder / "tmp").glob(COUNTERS):
            kept = self.folder / "counts" / f"{file.parent.name}-{file.name}"
            if kept.name not in self.kept:
                with suppress(OSError):
                    os.link(file, kept)
                    self.kept[kept.name] = kept

    def tokens_embedded(self) -> float:
        """Return the tokens of all batches that a model has embedded, committed or not."""
        self.keep_counts()
        return tokens_embedded(self.kept.values())

    def end_all(self) -> list[str]:
        """Ask all processes to end, as a deployment does. Return what doesn't end, and what is left behind."""
        said = self._too_many_connections()
        for process in self.fleet.processes.values():
            process.terminate()
        for name, process in self.fleet.processes.items():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                said.append(f"{name} doesn't end")
        with suppress(AssertionError):
            eventually(lambda: not self._processes(), "no process", 15)
        said += [f"a process is left: {command[:6]}" for command in self._processes()]
        names = "'^vectormill-(worker|heartbeat|dispatcher|background)( |$)'"
        query = f"select count(*) from pg_stat_activity where application_name ~ {names}"
        with suppress(AssertionError):
            eventually(lambda: self.scalar(query) == 0, "no connection", 10)
        if count := self.scalar(query):
            said.append(f"{count} connections are left")
        # torch leaves its compiler's folder behind, and a worker that was killed an empty one.
        files = sorted(path.name for path in (self.folder / "tmp").iterdir() if "torchinductor" not in path.name)
        if len(files) > self.killed or not all(name.startswith("pymp-") for name in files):
            said.append(f"files are left: {files[:5]}")
        return said

    def _too_many_connections(self) -> list[str]:
        """Return the applications that hold more connections than their pools allow."""
        query = "select application_name, count(*) from pg_stat_activity group by 1"
        held = {row["application_name"]: row["count"] for row in self.rows(query)}
        workers = len(WORKERS) + (BRITTLE in self.models)
        most = {
            "vectormill-worker": 3 * _REPLICAS * workers,
            "vectormill-heartbeat": workers,
            "vectormill-dispatcher": 2 * len(DISPATCHERS),
            "vectormill-background": background.CONNECTIONS * len(DISPATCHERS),
            "vectormill-api": AT_ONCE + transfers.CONNECTIONS,
        }
        over = {name: (held[name], bound) for name, bound in most.items() if held.get(name, 0) > bound}
        return [f"{name} holds {count} connections, not {bound} at most" for name, (count, bound) in over.items()]

    def _processes(self) -> list[list[str]]:
        """Return the commands of our processes, whatever their parents are by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.folder / "tmp"):
                    found.append(process.cmdline())
        return found


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def site(
    *, lease_seconds: float, chunk_items: int | None = None, disks: bool = True, brittle: bool = False
) -> Iterator[Site]:
    """Make an installation with four models (`minilm`, `static`, `small` and the upstream's `far`), and `brittle` if
    asked for.
    Nothing is started yet. All that it starts ends with the block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="drill-")))
        folder.chmod(0o711)
        home = folder / "home"
        if os.geteuid() == 0:
            stack.callback(remove_what_root_keeps, home)
        for name in ("tmp", "counts", "logs"):
            (folder / name).mkdir()
        account = Place.of_home(home).account
        can = disks and os.geteuid() == 0 and shutil.which("mount") is not None
        tables = stack.enter_context(small_disk(folder / "tables", _DISK_BYTES, account)) if can else None
        parquet = stack.enter_context(small_disk(folder / "parquet", _DISK_BYTES, None)) if can else None
        running = stack.enter_context(running_servers(home, lambda url: _prepare(url, tables)))
        database, broker = urlsplit(running.database_url), urlsplit(running.redis_url)
        assert database.port
        assert broker.port
        store = stack.enter_context(s3_server(BUCKET))
        stack.enter_context(environment_of(store))
        gateway = stack.enter_context(scripted_gateway())
        engine = make_engine(running.database_url, application="vectormill-tests", pool_size=8)
        stack.callback(engine.dispose)
        environment = {
            **store,
            "VECTORMILL_DATABASE_URL": running.database_url,
            "VECTORMILL_REDIS_URL": running.redis_url,
            "VECTORMILL_LEASE_SECONDS": str(lease_seconds),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(folder / "tmp"),
            "FAR_KEY": GATEWAY_KEY,
        }
        if chunk_items:
            environment["VECTORMILL_CHUNK_ITEMS"] = str(chunk_items)
        fleet = Fleet(engine, environment, folder / "logs")
        stack.callback(fleet.close)
        made = Site(
            fleet=fleet,
            folder=folder,
            home=home,
            wire=stack.enter_context(line_to("127.0.0.1", database.port, Wire)),
            redis_line=stack.enter_context(line_to("127.0.0.1", broker.port, Line)),
            store_line=stack.enter_context(
                line_to("127.0.0.1", urlsplit(store["AWS_ENDPOINT_URL"]).port or 0, StoreLine)
            ),
            redis_url=running.redis_url,
            gateway=gateway,
            lease_seconds=lease_seconds,
            models=("minilm", "static", "small", "far", *([BRITTLE] if brittle else [])),
            api_url=f"http://127.0.0.1:{free_port()}",
            flower_url=f"http://127.0.0.1:{free_port()}",
            metrics_ports={name: free_port() for name in DISPATCHERS},
            logins=logins(running.database_url),
            tables=tables,
            parquet=parquet,
        )
        _add_models(made)
        yield made


def _prepare(url: str, tables: Disk | None) -> None:
    if tables:
        name = sql.Identifier(urlsplit(url).path.removeprefix("/"))
        with psycopg.connect(url, autocommit=True) as connection:
            where = sql.Literal(str(tables.folder))
            connection.execute(sql.SQL("create tablespace small location {}").format(where))
            connection.execute(sql.SQL("alter database {} set default_tablespace = small").format(name))
    engine = make_engine(url, application="vectormill-tests")
    with engine.begin() as connection:
        upgrade(connection)
        witness.install(connection)
    engine.dispose()


def _add_models(made: Site) -> None:
    # In a fresh checkout the models are made first, which takes longer than a transaction may idle.
    minilm, static = described("all-MiniLM-L6-v2", bundled_folder()), described("static-256", static_folder())
    small = described("static-64", static_folder(64))
    with made.fleet.engine.begin() as connection:
        add_model(connection, "minilm", minilm)
        add_model(connection, "static", static)
        add_model(connection, "small", small)
        if BRITTLE in made.models:
            add_model(connection, BRITTLE, static)
    where = ("--gateway", made.gateway.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
    made.fleet.cli("models", "add", "far", *where, "--request-inputs", "50")
