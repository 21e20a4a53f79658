"""Children that replace dead ones in a worker: the time until the next chunk, and what a new one costs."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import psutil
from sqlalchemy import text

from pipeline.cli.context import CommandContext
from tests.benchmarks.corpus import distinct_docstrings, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, submit_file, whole_machine

_DOCSTRINGS = 20_000
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.01

#: True if a chunk was claimed or ended after a moment.
_CLAIMED = "select exists (select from vectormill.chunks where job_id = :job and started_at > :moment)"
_ENDED = "select exists (select from vectormill.chunks where job_id = :job and finished_at > :moment)"

#: Measures a new child, given the seconds until its first claim.
Look = Callable[[psutil.Process, float], float]


def _measure(limit: float, at_claim: Look | None, at_end: Look | None, rounds: Rounds) -> Values:
    """Return the limit and what was measured, in each round after all children were killed at once."""
    with TemporaryDirectory() as folder, whole_machine() as running, connected(running) as place:
        rows = [(f"doc-{n}", body) for n, body in enumerate(distinct_docstrings(_DOCSTRINGS))]
        job = submit_file(place, write_rows(Path(folder, "corpus.jsonl"), rows))

        def once(_: int) -> float:
            _await(place, job, _ENDED, _now(place))  # otherwise a worker that loses chunk after chunk rests
            moment = _now(place)
            for child in _children():
                child.kill()
            since = time.monotonic()
            _await(place, job, _CLAIMED, moment)
            seconds = time.monotonic() - since
            # The first to claim has used the most CPU.
            child = max(_children(), key=lambda each: sum(each.cpu_times()[:2]))
            if at_claim:
                return at_claim(child, seconds)
            _await(place, job, _ENDED, moment)
            assert at_end
            return at_end(child, seconds)

        return rounds.interleave({"limit": lambda _: limit, "taken": once})


def _now(place: CommandContext) -> object:
    with place.engine.begin() as connection:
        return connection.execute(text("select clock_timestamp()")).scalar_one()


def _await(place: CommandContext, job: UUID, question: str, moment: object) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with place.engine.begin() as connection:
            if connection.execute(text(question), {"job": job, "moment": moment}).scalar_one():
                return
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"not within {_PATIENCE_SECONDS:g} s: {question}")


def _children() -> list[psutil.Process]:
    """Return the children of this machine's worker."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "workers.runner.app" in process.cmdline():
                return [child for server in process.children() for child in server.children()]
    return []


BENCHMARKS = (
    Benchmark(
        name="new_child_next_chunk",
        target=1.0,
        unit="ms",
        measure=partial(_measure, 2_000, lambda _, seconds: seconds * 1000, None),
    ),
    Benchmark(
        name="new_child_cpu",
        target=1.0,
        unit="ms",
        measure=partial(_measure, 1_000, lambda child, _: sum(child.cpu_times()[:2]) * 1000, None),
    ),
    Benchmark(
        name="new_child_memory",
        target=1.0,
        unit="MB",
        measure=partial(_measure, 300, None, lambda child, _: child.memory_full_info().uss / 1e6),
    ),
)
