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

_ITEMS, _DOCSTRINGS = 20_000, 1_000
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.01

#: Numbers that grow with each claim, and with each end of a chunk.
_CLAIMS = "select coalesce(sum(fence), 0) from vectormill.chunks where job_id = :job"
_ENDS = "select count(*) from vectormill.chunks where job_id = :job and finished_at is not null"

#: Measures a new child, given the seconds until its first claim.
Look = Callable[[psutil.Process, float], float]


def _measure(limit: float, look: Look, rounds: Rounds) -> Values:
    """Return the limit and what was measured, in each round after all children were killed at once."""
    with TemporaryDirectory() as folder, whole_machine() as running, connected(running) as place:
        texts = distinct_docstrings(_DOCSTRINGS)
        rows = [(f"doc-{n}", f"{n}: {texts[n % _DOCSTRINGS]}") for n in range(_ITEMS)]
        job = submit_file(place, write_rows(Path(folder, "corpus.jsonl"), rows))

        def once(_: int) -> float:
            # Otherwise a worker that loses chunk after chunk rests.
            _await_more(place, job, _ENDS, _count(place, job, _ENDS))
            children, since = _children(), time.monotonic()
            for child in children:
                child.kill()
            psutil.wait_procs(children)
            _await_more(place, job, _CLAIMS, _count(place, job, _CLAIMS))
            seconds = time.monotonic() - since
            # The first to claim has used the most CPU.
            return look(max(_children(), key=_cpu_seconds), seconds)

        return rounds.interleave({"limit": lambda _: limit, "taken": once})


def _count(place: CommandContext, job: UUID, question: str) -> int:
    with place.engine.begin() as connection:
        return int(connection.execute(text(question), {"job": job}).scalar_one())


def _await_more(place: CommandContext, job: UUID, question: str, before: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if _count(place, job, question) > before:
            return
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"not within {_PATIENCE_SECONDS:g} s: {question}")


def _cpu_seconds(child: psutil.Process) -> float:
    return float(sum(child.cpu_times()[:2]))


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
        measure=partial(_measure, 2_000, lambda _, seconds: seconds * 1000),
    ),
    Benchmark(
        name="new_child_cpu",
        target=1.0,
        unit="ms",
        measure=partial(_measure, 1_000, lambda child, _: _cpu_seconds(child) * 1000),
    ),
    Benchmark(
        name="new_child_memory",
        target=1.0,
        unit="MB",
        measure=partial(_measure, 300, lambda child, _: child.memory_full_info().uss / 1e6),
    ),
)
