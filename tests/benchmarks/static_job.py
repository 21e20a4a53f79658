"""Million short texts through a static model, from the file to the last commit, against INSERT … SELECT of the same
vectors into a table like the one they are in."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from sqlalchemy import text

from pipeline.catalog.models import add_model
from pipeline.cli.context import CommandContext
from pipeline.core.options import JobOptions
from tests.benchmarks.corpus import short_rows, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.job import wait_until_completed
from tests.benchmarks.machine import connected, forget_jobs, submit_file, whole_machine
from tests.support.models import described, static_folder

_MODEL = "static-256"
_ROWS = 1_000_000
_WARM_UP_ROWS = 50_000
_COPY_OF = """
    insert into public.vectors (job_id, index, vector_space_id, tokens, truncated, vector, half, key)
    select job_id, index, vector_space_id, tokens, truncated, vector, half, key from vectormill.embeddings
    where job_id = :job
"""


def measure(rounds: Rounds) -> Values:
    """Return rows per second of both, each into tables that were empty before."""
    with TemporaryDirectory() as folder, whole_machine() as running, connected(running) as place:
        with place.engine.begin() as connection:
            add_model(connection, _MODEL, described(_MODEL, static_folder()))
            connection.execute(text("create table public.vectors (like vectormill.embeddings including all)"))
        rows = short_rows(_ROWS)
        _job(place, write_rows(Path(folder, "warm-up.jsonl"), rows[:_WARM_UP_ROWS]))
        corpus = write_rows(Path(folder, "rows.jsonl"), rows)
        return rounds.interleave(
            {
                "job": lambda _: _ROWS / _job_seconds(place, corpus),
                "INSERT … SELECT": lambda _: _ROWS / _insert_seconds(place),
            }
        )


def _job(place: CommandContext, corpus: Path) -> UUID:
    job = submit_file(place, corpus, model=_MODEL, options=JobOptions())
    wait_until_completed(place, job)
    return job


def _job_seconds(place: CommandContext, corpus: Path) -> float:
    forget_jobs(place)
    start = time.perf_counter()
    _job(place, corpus)
    return time.perf_counter() - start


def _insert_seconds(place: CommandContext) -> float:
    """Copy the vectors of the job that has just been measured."""
    with place.engine.begin() as connection:
        connection.execute(text("truncate public.vectors"))
        (job,) = connection.execute(text("select id from vectormill.jobs")).scalars()
    start = time.perf_counter()
    with place.engine.begin() as connection:
        assert connection.execute(text(_COPY_OF), {"job": job}).rowcount == _ROWS
    return time.perf_counter() - start


BENCHMARK = Benchmark(name="static_million_vs_insert_select", target=1 / 3, unit="rows/s", measure=measure)
