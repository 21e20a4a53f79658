"""Start order and readiness checks of `up`'s own processes: worker, dispatcher, engine, api and Flower."""

import os
import secrets
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from pipeline.embedded.files import write_private
from pipeline.embedded.postgres import STOP_SECONDS as SERVER_STOP_SECONDS
from pipeline.embedded.processes import our_environment, our_module
from pipeline.embedded.runtime import Running
from pipeline.embedded.supervisor import Child
from pipeline.infra.http import status_of

_DISPATCHER_LEADS = "SELECT count(*) FROM vectormill.leases WHERE name = 'dispatcher' AND lease_until > now()"
_WORKERS_SEEN = "SELECT count(*) FROM vectormill.workers WHERE seen_at > %s"
_ENGINES_SEEN = "SELECT count(*) FROM vectormill.engines WHERE seen_at > %s"
_GRACE_SECONDS = 60.0
#: Longer than any chunk takes.
_WORKER_GRACE_SECONDS = 330.0
#: Longer than any request takes.
_REQUEST_GRACE_SECONDS = 630.0
#: How long an orderly stop may take, one stage after the other, with the servers' and some to spare.
STOP_SECONDS = 2 * _REQUEST_GRACE_SECONDS + SERVER_STOP_SECONDS + 60.0
#: A busy machine takes its time to answer.
_ANSWER_SECONDS = 30


def worker_names(workers: int) -> list[str]:
    """Return the names of the worker processes."""
    return [f"worker-{number}" for number in range(1, workers + 1)] if workers > 1 else ["worker"]


def metered_names(workers: int) -> list[str]:
    """Return the names of the children that serve metrics on a port of their own."""
    return ["engine", "dispatcher", *worker_names(workers)]


def app_stages(running: Running, workers: int, *, queries_as_owner: bool = False) -> Iterator[tuple[Child, ...]]:
    """Yield the stages that follow the servers. None needs an earlier one to start; the last is stopped first.

    Args:
        workers: how many worker processes, each with its own children.
        queries_as_owner: whether queries of requests in SQL may run as the database's owner, since all of it is one
            person's.
    """
    environment = _environment(running)
    if queries_as_owner:
        environment["VECTORMILL_SQL_URL"] = running.database_url
    url = running.database_url
    started = _database_time(url)

    def metered(name: str) -> dict[str, str]:
        port = running.metrics_ports.get(name)
        return environment if port is None else {**environment, "VECTORMILL_METRICS_PORT": str(port)}

    yield (
        _child("dispatcher", metered("dispatcher"), lambda: _count(url, _DISPATCHER_LEADS) > 0),
        *(
            _child(
                name,
                metered(name),
                lambda: _count(url, _WORKERS_SEEN, started) >= workers,
                # A warm shutdown lets the chunk at hand end.
                stop_grace_seconds=_WORKER_GRACE_SECONDS,
            )
            for name in worker_names(workers)
        ),
        _child(
            "engine",
            {**environment, "VECTORMILL_ENGINE_PORT": str(running.metrics_ports.get("engine", 0))},
            lambda: _count(url, _ENGINES_SEEN, started) > 0,
            stop_grace_seconds=_REQUEST_GRACE_SECONDS,
        ),
    )
    # What is in flight there needs the engine to its end.
    yield (
        _child(
            "api",
            environment,
            lambda: _answers(f"{running.api_url}/healthz"),
            stop_grace_seconds=_REQUEST_GRACE_SECONDS,
        ),
        _child("flower", environment, lambda: _answers(f"{running.flower_url}/healthcheck", running.flower_password)),
    )


def _child(
    name: str,
    environment: dict[str, str],
    ready: Callable[[], bool],
    stop_grace_seconds: float = _GRACE_SECONDS,
) -> Child:
    command = name.split("-", maxsplit=1)[0]
    return Child(
        name=name,
        command=our_module("pipeline.cli", command),
        env=environment,
        cwd=Path.cwd(),
        ready=ready,
        stop_grace_seconds=stop_grace_seconds,
    )


def _environment(running: Running) -> dict[str, str]:
    return our_environment(
        {
            "VECTORMILL_HOME": str(running.home),
            "VECTORMILL_METRICS_HOST": "127.0.0.1",
            "VECTORMILL_DATABASE_URL": running.database_url,
            "VECTORMILL_REDIS_URL": running.redis_url,
            "VECTORMILL_API_PORT": str(urlsplit(running.api_url).port),
            "VECTORMILL_FLOWER_PORT": str(urlsplit(running.flower_url).port),
            "VECTORMILL_FLOWER_URL": running.flower_url,
            "VECTORMILL_FLOWER_PASSWORD": running.flower_password,
            "VECTORMILL_ENGINE_SECRET": os.environ.get("VECTORMILL_ENGINE_SECRET") or _engine_secret(running.home),
        }
    )


def _engine_secret(home: Path) -> str:
    """Return the secret that this home's engine and api share, creating it the first time."""
    file = home / "run" / "engine.secret"
    if not file.exists():
        write_private(file, secrets.token_hex(24))
    return file.read_text().strip()


def _database_time(url: str) -> datetime:
    with psycopg.connect(url, connect_timeout=_ANSWER_SECONDS) as connection:
        row = connection.execute("SELECT now()").fetchone()
    assert row
    time: datetime = row[0]
    return time


def _count(url: str, query: str, *parameters: object) -> int:
    """Return the query's count; -1 while the database can't be asked."""
    try:
        with psycopg.connect(url, connect_timeout=_ANSWER_SECONDS) as connection:
            row = connection.execute(query.encode(), parameters).fetchone()
    except psycopg.Error:
        return -1
    return int(row[0]) if row else -1


def _answers(url: str, password: str | None = None) -> bool:
    """Return True if a server answers; with `password` it is asked as the user `vectormill`."""
    credentials = b64encode(f"vectormill:{password}".encode()).decode()
    headers = [("authorization", f"Basic {credentials}")] if password else []
    return status_of(url, seconds=_ANSWER_SECONDS, headers=headers) == HTTPStatus.OK
