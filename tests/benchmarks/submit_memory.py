"""Peak memory of `vectormill submit` with a million rows, against four million."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.cli.context import CommandContext
from tests.benchmarks.corpus import write_tiny_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, forget_jobs, servers

_MILLION = 1_000_000


def measure(rounds: Rounds) -> Values:
    """Return the peak MB of each."""
    with TemporaryDirectory() as folder, servers() as running, connected(running) as place:
        one = write_tiny_rows(Path(folder, "one.jsonl"), _MILLION)
        four = write_tiny_rows(Path(folder, "four.jsonl"), 4 * _MILLION)
        environment = {**os.environ, "VECTORMILL_DATABASE_URL": running.database_url}
        try:
            return rounds.interleave(
                {
                    "1M rows": lambda _: _peak_megabytes(place, one, environment),
                    "4M rows": lambda _: _peak_megabytes(place, four, environment),
                }
            )
        finally:
            forget_jobs(place)


def _peak_megabytes(place: CommandContext, corpus: Path, environment: Mapping[str, str]) -> float:
    forget_jobs(place)
    submit = ["-m", "pipeline.cli", "submit", str(corpus), "--model", BUNDLED_MODEL]
    command = [sys.executable, "-m", "tests.benchmarks.peak", sys.executable, *submit]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return int(output) / 1e6


BENCHMARK = Benchmark(name="submit_memory_1m_vs_4m", target=0.9, unit="MB", measure=measure)
