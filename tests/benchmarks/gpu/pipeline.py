"""Whole jobs of a dispatcher and a worker on the device, into Postgres and into Parquet."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import make_url, text

from pipeline.catalog.models import add_model
from pipeline.cli.bootstrap import migrate_database
from pipeline.cli.context import CommandContext
from pipeline.core.options import JobOptions
from pipeline.db.database import make_engine
from pipeline.embedded.processes import our_environment, our_module
from pipeline.embedded.runtime import Running
from pipeline.embedded.supervisor import Child
from pipeline.infra.settings import Settings
from pipeline.jobs import control
from tests.benchmarks.corpus import write_rows
from tests.benchmarks.job import wait_until_completed
from tests.benchmarks.machine import NO_REUSE, connected, machine, submit_file
from workers.encoders.weights import WeightsSource
from workers.oneshot import describe

_PARQUET = "Parquet"
OUTPUTS = ("Postgres", _PARQUET)
_CHECKOUT = Path(__file__).resolve().parents[3]
_WARM_UP_TEXTS, _WARM_UP_CHUNK_ITEMS = 160, 16
_GRACE_SECONDS = 5.0
_ACCOUNT = """
    select extract(epoch from j.finished_at - j.queued_at)::float8, sum(c.embedded), sum(c.prompt_tokens)
    from vectormill.jobs j join vectormill.chunks c on c.job_id = j.id where j.id = :job group by j.id
"""


class Fleet:
    """Dispatcher and worker with their models."""

    def __init__(self, place: CommandContext, folder: Path) -> None:
        self._place, self._folder = place, folder
        self._warm: set[str] = set()

    def rate(self, model: str, texts: list[str], output: str, until: float) -> float:
        """Return a job's tokens per second, from queued to completed, with vectors to one of `OUTPUTS`.

        Raises:
            TimeoutError: it wasn't completed `until` a time of the monotonic clock.
        """
        if model not in self._warm:
            # While the first replica loads the model, the others get chunks too.
            self._run(model, texts[:_WARM_UP_TEXTS], NO_REUSE, until, chunk_items=_WARM_UP_CHUNK_ITEMS)
            self._warm.add(model)
        folder = str(self._folder / f"vectors-{uuid4().hex}") if output == _PARQUET else None
        job = self._run(model, texts, JobOptions(output=folder, reuse=False), until)
        with self._place.engine.begin() as connection:
            taken, embedded, tokens = connection.execute(text(_ACCOUNT), {"job": job}).one()
        assert embedded == len(texts), f"{len(texts) - embedded:,} texts have no vector"
        return float(tokens) / float(taken)

    def _run(self, model: str, texts: list[str], options: JobOptions, until: float, **plan: int) -> UUID:
        corpus = write_rows(self._folder / "corpus.jsonl", [(f"doc-{n}", body) for n, body in enumerate(texts)])
        job = submit_file(self._place, corpus, lambda usual: replace(usual, **plan), model, options)
        try:
            wait_until_completed(self._place, job, until - monotonic())
        except TimeoutError:
            with self._place.engine.begin() as connection:
                control.cancel(connection, job)
            raise
        return job


@contextmanager
def fleet(models: Mapping[str, Path], device: str) -> Iterator[Fleet]:
    """Run dispatcher and worker in bfloat16, with servers from wheels where no URL is set.

    Raises:
        ServerFailed: there is no server.
    """
    with TemporaryDirectory(prefix="vectormill-bench-") as folder, _own_database(Path(folder)) as settings:

        def prepare(url: str) -> None:
            migrate_database(url)
            engine = make_engine(url, application="vectormill-cli")
            for name, weights in models.items():
                description = describe(WeightsSource(path=str(weights)))
                with engine.begin() as connection:
                    add_model(connection, name, description)
            engine.dispose()

        with (
            machine(settings, prepare, lambda running: [_processes(running, device)]) as running,
            connected(running) as place,
        ):
            yield Fleet(place, Path(folder))


@contextmanager
def _own_database(folder: Path) -> Iterator[Settings]:
    """Yield settings with a new database for the length of the block, if they name a server."""
    settings = Settings(home=folder / "home")
    if settings.database_url is None:
        yield settings
        return
    server, name = settings.database_url.get_secret_value(), f"vectormill_bench_{uuid4().hex}"
    url = make_url(server).set(database=name).render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            yield settings.model_copy(update={"database_url": SecretStr(url)})
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _processes(running: Running, device: str) -> tuple[Child, ...]:
    environment = our_environment(
        {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")])),
            "VECTORMILL_HOME": str(running.home),
            "VECTORMILL_DATABASE_URL": running.database_url,
            "VECTORMILL_REDIS_URL": running.redis_url,
        }
    )
    where = "0" if device == "cuda" else device
    commands = {
        "dispatcher": ("dispatcher",),
        "worker": ("worker", "--devices", where, "--precision", "bfloat16"),
    }
    return tuple(
        Child(
            name=name,
            command=our_module("pipeline.cli", *command),
            env=environment,
            cwd=Path.cwd(),
            ready=lambda: True,  # the first job waits for them
            stop_grace_seconds=_GRACE_SECONDS,
        )
        for name, command in commands.items()
    )
