"""Fixtures of the ecosystem tests: the gateway of the contract tests with a dispatcher and a worker, and third-party
programs that use it. All tests share one gateway, each with names of its own."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from pipeline.embedded.runtime import Running
from tests.contract.conftest import Gateway, by_library, running_gateway

__all__ = ["by_library"]

CHECKOUT = Path(__file__).resolve().parents[2]
SCHEDULERS = CHECKOUT / "ops" / "schedulers"
#: Virtual environments made by `make test-ecosystem`.
_PROGRAMS = CHECKOUT / ".venv-ecosystem" / "bin"
_ORCHESTRATORS = CHECKOUT / ".venv-orchestrators" / "bin"
#: Folder of the Python client, which is all that it takes of us.
_CLIENT = CHECKOUT / "pipeline" / "client"
_SECONDS = 300


@dataclass
class Site:
    """Somebody else's machine with their programs and a folder for their files, and our gateway with a worker."""

    gateway: Gateway
    folder: Path
    #: Role that runs the queries of `vectormill.submit`.
    reader: str

    def run(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of their programs to its end, whatever its exit code."""
        return self._run(_PROGRAMS, program, arguments, environment)

    def orchestrate(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Dagster or Prefect, with the Python client and a key."""
        environment |= {"VECTORMILL_API_URL": self.gateway.url, "VECTORMILL_API_KEY": self.gateway.key}
        environment["PYTHONPATH"] = str(_CLIENT)
        return self._run(_ORCHESTRATORS, program, arguments, environment)

    def _run(
        self, programs: Path, program: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(programs / program), *arguments],
            cwd=self.folder,
            env={**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write a file of JSON lines in the folder; return its path."""
        file = self.folder / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def embedded(self) -> int:
        """Return the number of texts that were embedded for jobs and metered."""
        query = "select coalesce(sum(items), 0) from vectormill.usage where job_id is not null"
        return int(self.gateway.fleet.scalar(query))

    def collection(self, name: str) -> None:
        """Create a collection of tickets."""
        text = "{subject}\n\n{body}"
        self.gateway.fleet.cli("collections", "create", name, "--model", "static", "--text", text)

    def syncs(self, name: str) -> list[tuple[int, ...]]:
        """Return what each completed sync of a collection added, changed, left as it was and removed."""
        query = """
            select coalesce(json_agg(array[s.added, s.changed, s.unchanged, s.removed] order by s.job_id), '[]')
            from vectormill.syncs s join vectormill.collections c on c.id = s.collection_id
            where c.name = :name and s.settled_at is not null
        """
        return [tuple(row) for row in self.gateway.fleet.scalar(query, name=name)]

    def jobs(self, name: str) -> list[str]:
        """Return the states of the jobs of this name."""
        query = "select coalesce(json_agg(state order by id), '[]') from vectormill.jobs where name = :name"
        return list(self.gateway.fleet.scalar(query, name=name))


def batch_lines(about: str, count: int) -> list[dict[str, Any]]:
    """Return lines of a batch request that no other test makes."""
    return [
        {
            "custom_id": f"{about}-{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "static", "input": f"{about}: the mill grinds {n} sacks"},
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def site(
    servers: Running,
    static_description: dict[str, Any],
    bundled_description: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    for programs in (_PROGRAMS, _ORCHESTRATORS):
        assert programs.exists(), "make test-ecosystem installs what these tests run"
    folder, ours = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("gateway")
    with running_gateway(servers, static_description, bundled_description, ours) as gateway:
        reader, sql_url = new_role(gateway)
        gateway.fleet.environment["VECTORMILL_API_SOURCES"] = str(folder)
        gateway.fleet.environment["VECTORMILL_SQL_URL"] = sql_url
        gateway.stop_api()
        gateway.start_api()
        gateway.fleet.start_dispatcher()
        gateway.fleet.start_worker(replicas=1)
        yield Site(gateway, folder, reader)


def new_role(gateway: Gateway) -> tuple[str, str]:
    """Make a role that may log in and do nothing else. Return its name, and the database's URL for it."""
    name, password = f"role_{uuid4().hex}", uuid4().hex
    url = gateway.fleet.environment["VECTORMILL_DATABASE_URL"]
    with psycopg.connect(url) as connection:
        # The role isn't dropped, since it goes with the servers of the tests.
        make = sql.SQL("create role {} login password {}")
        connection.execute(make.format(sql.Identifier(name), sql.Literal(password)))
    address = urlsplit(url)
    return name, address._replace(netloc=f"{name}:{password}@{address.hostname}:{address.port}").geturl()


@dataclass
class Airflow:
    """Airflow of its own on SQLite, with connections to the gateway."""

    site: Site
    environment: dict[str, str]

    def run(
        self, dag: str, day: str, *, parameters: Mapping[str, str] = {}, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a DAG of `ops/schedulers/airflow` for a day, as `airflow dags test` does."""
        conf = json.dumps({"folder": str(self.site.folder), "model": "static", **parameters})
        environment = {**self.environment, **environment}
        return self.site.run("airflow", "dags", "test", dag, day, "--conf", conf, **environment)

    def python(self, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program in Airflow's Python."""
        return self.site.run("python", "-c", program, **self.environment, **environment)


def by_http(url: str, key: str) -> str:
    """Return an Airflow connection to an api, as JSON."""
    address = urlsplit(url)
    return json.dumps(
        {
            "conn_type": "http",
            "schema": "http",
            "host": address.hostname,
            "port": address.port,
            "extra": {"Authorization": f"Bearer {key}"},
        }
    )


@pytest.fixture(scope="session")
def airflow(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    home = tmp_path_factory.mktemp("airflow")
    by_openai = {
        "conn_type": "openai",
        "host": f"{site.gateway.url}/v1",
        "password": site.gateway.key,
        "extra": {"openai_client_kwargs": {"max_retries": 8}},
    }
    made = Airflow(
        site,
        {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(SCHEDULERS / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
            "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps(by_openai),
            "AIRFLOW_CONN_VECTORMILL": by_http(site.gateway.url, site.gateway.key),
        },
    )
    done = site.run("airflow", "db", "migrate", **made.environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return made
