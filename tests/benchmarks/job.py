"""Whole job, from queued to completed, against the bare encoder on the same texts."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from sqlalchemy import text

from pipeline.cli.context import CommandContext
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.db import jobs
from tests.benchmarks.bare import bare_engine, turn
from tests.benchmarks.corpus import distinct_docstrings, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import NO_REUSE, connected, submit_file, whole_machine

_DOCSTRINGS = 3_300
_WARM_UP_DOCSTRINGS = 160
_WARM_UP_CHUNK_ITEMS = 16
_WARM_UPS = 5
_JOB_SECONDS = 600.0
_POLL_SECONDS = 0.1

#: True if two chunks of a job ran at once.
_OVERLAP = """
    select exists (select from vectormill.chunks a join vectormill.chunks b on a.job_id = b.job_id and a.id < b.id
                   where a.job_id = :job and a.started_at < b.finished_at and b.started_at < a.finished_at)
"""
_ACCOUNT = """
    select extract(epoch from j.finished_at - j.queued_at)::float8,
           (select count(*) from vectormill.embeddings e where e.job_id = j.id)
    from vectormill.jobs j where j.id = :job
"""


def measure(rounds: Rounds) -> Values:
    """Return items per second of both. While one works, the other waits for its turn."""
    texts = distinct_docstrings(_DOCSTRINGS)
    with (
        TemporaryDirectory() as folder,
        whole_machine() as running,
        connected(running) as place,
        bare_engine(Path(folder, "texts.json"), texts) as engine,
    ):
        rows = [(f"doc-{n}", body) for n, body in enumerate(texts)]
        corpus = write_rows(Path(folder, "corpus.jsonl"), rows)
        warm_up(place, folder, texts)
        return rounds.interleave(
            {
                "job": lambda _: _DOCSTRINGS / job_seconds(place, corpus, _DOCSTRINGS),
                "bare encoder": lambda _: _DOCSTRINGS / turn(engine),
            }
        )


def warm_up(place: CommandContext, folder: str, texts: Sequence[str]) -> None:
    """Run small jobs until two chunks have run at once, which shows that both replicas have loaded the model."""
    rows = [(f"doc-{n}", body) for n, body in enumerate(texts[:_WARM_UP_DOCSTRINGS])]
    corpus = write_rows(Path(folder, "warm-up.jsonl"), rows)
    for _ in range(_WARM_UPS):
        job = submit_file(place, corpus, lambda usual: replace(usual, chunk_items=_WARM_UP_CHUNK_ITEMS))
        wait_until_completed(place, job)
        with place.engine.begin() as connection:
            if connection.execute(text(_OVERLAP), {"job": job}).scalar_one():
                return
    raise RuntimeError("the worker's replicas never ran at once")


def job_seconds(place: CommandContext, corpus: Path, items: int, options: JobOptions = NO_REUSE) -> float:
    """Return the seconds from queued to completed of a job of so many items, by the database's clock."""
    job = submit_file(place, corpus, options=options)
    wait_until_completed(place, job)
    with place.engine.begin() as connection:
        seconds, embedded = connection.execute(text(_ACCOUNT), {"job": job}).one()
    assert embedded == items
    return float(seconds)


def wait_until_completed(place: CommandContext, job: UUID, seconds: float = _JOB_SECONDS) -> None:
    """Poll until a job is completed, since its end sends no event.

    Raises:
        RuntimeError: it ended otherwise.
        TimeoutError: it wasn't completed in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with place.engine.begin() as connection:
            now = jobs.by_id(connection, job)
        assert now
        if now.state is JobState.COMPLETED:
            return
        if now.state.ended or now.state is JobState.PAUSED:
            raise RuntimeError(f"the job is {now.state}: {now.reason} {now.message}")
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"the job wasn't completed within {seconds:.0f} s")


BENCHMARK = Benchmark(name="job_vs_engine", target=0.95, unit="items/s", measure=measure)
