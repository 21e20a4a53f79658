"""Peak memory of producer, dispatcher and worker with 200,000 rows, against ten times as many.

Both ways: rows through Postgres, and by reference from one Parquet file into Parquet parts.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.jobs import JobState
from pipeline.db import jobs
from pipeline.embedded.runtime import Running
from tests.benchmarks.corpus import write_tiny_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, model_folder, whole_machine
from tests.support.models import make_static_model

_FEW, _MANY = 200_000, 2_000_000
_BLOCK = 50_000
_JOB_SECONDS = 1_200.0
_SAMPLE_SECONDS = 0.1


def _measure(process: str, rounds: Rounds) -> Values:
    """Return the peak MB of a process. All is run once, however many rounds are asked for: it takes minutes."""
    return Rounds(1, rounds.on_value).interleave(
        {
            "200k rows": lambda _: _peaks(_FEW)[process],
            "2M rows": lambda _: _peaks(_MANY)[process],
        }
    )


@cache
def _peaks(rows: int) -> dict[str, float]:
    """Return the peak megabytes of each of the processes, over both ways."""
    peaks: dict[str, float] = defaultdict(float)
    with TemporaryDirectory(prefix="vectormill-bench-") as folder, whole_machine() as running:
        static = Path(folder, "static")
        make_static_model(model_folder(), static)
        _run(running, "models", "add", "static", "--path", str(static))
        text = write_tiny_rows(Path(folder, "rows.jsonl"), rows)
        table = _write_parquet(Path(folder, "rows.parquet"), rows)
        _job(running, rows, peaks, str(text), "--by-value")
        _job(running, rows, peaks, str(table), "--by-reference", "--output", str(Path(folder, "out")))
    return dict(peaks)


def _write_parquet(path: Path, count: int) -> Path:
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for start in range(0, count, _BLOCK):
            texts = [f"the row of number {n}" for n in range(start, start + _BLOCK)]
            writer.write_table(pa.table({"text": texts}))
    return path


def _run(running: Running, *arguments: str) -> str:
    with _command(running, *arguments) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    return output.strip()


@contextmanager
def _command(running: Running, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    environment = {
        **os.environ,
        "VECTORMILL_DATABASE_URL": running.database_url,
        "VECTORMILL_REDIS_URL": running.redis_url,
    }
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _job(running: Running, rows: int, peaks: dict[str, float], *arguments: str) -> None:
    """Submit and await a job, and sample the memory of the processes meanwhile."""
    look = partial(_look, peaks)
    with _command(running, "submit", *arguments, "--model", "static", "--no-reuse") as producer:
        while producer.poll() is None:
            look("producer", lambda: [psutil.Process(producer.pid)])
            look("worker", lambda: _processes("worker"))
            time.sleep(_SAMPLE_SECONDS)
        job = producer.communicate()[0].strip()
        assert producer.returncode == 0
    deadline = time.monotonic() + _JOB_SECONDS
    with connected(running) as place:
        while time.monotonic() < deadline:
            look("worker", lambda: _processes("worker"))
            look("dispatcher", lambda: _processes("dispatcher"))
            with place.engine.begin() as connection:
                now = jobs.by_id(connection, UUID(job))
            assert now
            if now.state.ended:
                assert now.state is JobState.COMPLETED
                assert now.receipt
                assert now.receipt["items"]["embedded"] == rows
                return
            time.sleep(_SAMPLE_SECONDS)
    raise TimeoutError(f"the job wasn't completed within {_JOB_SECONDS:g} s")


def _look(peaks: dict[str, float], name: str, find: Callable[[], list[psutil.Process]]) -> None:
    """Record the memory of the largest of some processes, if it exceeds the peak so far."""
    for process in find():
        with suppress(psutil.NoSuchProcess):
            peaks[name] = max(peaks[name], process.memory_info().rss / 1e6)


def _processes(name: str) -> list[psutil.Process]:
    """Return the processes of this machine's dispatcher, or of its worker with its children."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command: list[Any] = child.cmdline()
            if name == "dispatcher" and command[-1:] == [name]:
                return [child]
            if name == "worker" and "workers.runner.app" in command and "worker" in command:
                return [child, *child.children(recursive=True)]
    return []


BENCHMARKS = tuple(
    Benchmark(name=f"memory_{process}_200k_vs_2m", target=0.9, unit="MB", measure=partial(_measure, process))
    for process in ("producer", "dispatcher", "worker")
)
