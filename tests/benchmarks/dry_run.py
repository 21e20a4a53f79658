"""Predictions of `vectormill submit --dry-run` against the jobs themselves: time, WAL and disk. See `--help`.

A prediction is made before a job by what is measured here, for less than half a minute, and after it by what the
workers did. The static model gets docstrings, the transformer a word and a number, so that a million take minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import text

from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.cli.context import CommandContext
from pipeline.core import humanize
from pipeline.embedded.runtime import Running
from tests.benchmarks.corpus import numbered_docstrings, numbered_words, write_rows
from tests.benchmarks.harness import use_default_settings
from tests.benchmarks.machine import connected, whole_machine
from tests.support.models import static_folder

_TARGET = 1.2
_ITEMS = (10_000, 100_000, 1_000_000)
_STATIC = "static-256"
_TEXTS = {_STATIC: numbered_docstrings, BUNDLED_MODEL: numbered_words}
_POLL_SECONDS = 0.5
_JOB_SECONDS = 7_200.0

_SIZES = """
    select pg_current_wal_insert_lsn() - '0/0'::pg_lsn as wal,
           (select sum(pg_total_relation_size(relid)) from (
              select relid from pg_partition_tree('vectormill.items') where isleaf
              union all select relid from pg_partition_tree('vectormill.embeddings') where isleaf) leaves) as disk
"""
_JOB = "select state, extract(epoch from finished_at - created_at)::float8 from vectormill.jobs where id = :job"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of a job: as it was predicted, and as it was."""

    model: str
    items: int
    what: str
    #: `here` or `workers`.
    measured: str
    predicted: float
    real: float

    @property
    def ratio(self) -> float:
        """The larger one divided by the smaller one."""
        return max(self.predicted, self.real) / max(1e-9, min(self.predicted, self.real))


@dataclass(frozen=True, slots=True)
class Bench:
    """Machine with its commands."""

    place: CommandContext
    environment: dict[str, str]

    def command(self, *arguments: str) -> str:
        """Run a command of vectormill, and return its standard output."""
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def predict(self, corpus: Path, model: str) -> dict[str, Any]:
        """Return a dry run's prediction."""
        found: dict[str, Any] = json.loads(
            self.command("submit", str(corpus), "--model", model, "--no-reuse", "--dry-run", "--json")
        )
        return found

    def do(self, corpus: Path, model: str) -> dict[str, float]:
        """Do the job. Return its seconds from submission to end, and the bytes that it took."""
        before = self._sizes()
        job = self.command("submit", str(corpus), "--model", model, "--no-reuse").strip()
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            with self.place.engine.begin() as connection:
                state, seconds = connection.execute(text(_JOB), {"job": job}).one()
            if seconds is not None:
                assert state == "completed", f"the job is {state}"
                after = self._sizes()
                return {"time": seconds, **{what: after[what] - before[what] for what in after}}
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"the job wasn't completed within {_JOB_SECONDS:g} s")

    def forget_work(self) -> None:
        """Delete the usage rows, from which a dry run knows the workers' rates."""
        with self.place.engine.begin() as connection:
            connection.execute(text("truncate vectormill.usage"))

    def _sizes(self) -> dict[str, float]:
        with self.place.engine.begin() as connection:
            row = connection.execute(text(_SIZES)).mappings().one()
        return {name: float(value) for name, value in row.items()}


def compare(bench: Bench, corpus: Path, model: str, items: int) -> Iterator[Comparison]:
    """Predict a job, do it, and predict it again. Yield the comparisons."""
    bench.forget_work()
    before = bench.predict(corpus, model)
    real = bench.do(corpus, model)
    after = bench.predict(corpus, model)
    for found in (before, after) if after["time"]["measured"] == "workers" else (before,):
        predicted = {
            "time": found["time"]["seconds"],
            "wal": found["pieces"]["wal_bytes"],
            "disk": found["pieces"]["disk_bytes"],
        }
        for what, value in predicted.items():
            if what == "time" or found is before:
                yield Comparison(model, items, what, found["time"]["measured"], value, real[what])


def main() -> int:
    """Compare. Return exit code 0, or with `--check` 1 if a prediction was off by more than a fifth."""
    arguments = _arguments()
    use_default_settings()
    found: list[Comparison] = []
    with TemporaryDirectory() as folder, whole_machine() as running, connected(running) as place:
        bench = Bench(place, _environment(running))
        bench.command("models", "add", _STATIC, "--path", str(static_folder()))
        for model in arguments.model or _TEXTS:
            for items in arguments.items or _ITEMS:
                corpus = write_rows(Path(folder, f"{items}.jsonl"), _TEXTS[model](items))
                for comparison in compare(bench, corpus, model, items):
                    found.append(comparison)
                    Console(stderr=True, highlight=False).print(_table([comparison], header=False))
                corpus.unlink()
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(_table(found))
    return int(arguments.check and any(each.ratio > _TARGET for each in found))


def _environment(running: Running) -> dict[str, str]:
    return {
        **os.environ,
        "VECTORMILL_HOME": str(running.home),
        "VECTORMILL_DATABASE_URL": running.database_url,
        "VECTORMILL_REDIS_URL": running.redis_url,
    }


def _table(found: list[Comparison], *, header: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=header)
    for heading in ("model", "items", "", "measured", "predicted", "real", "ratio", ""):
        table.add_column(heading, justify="right" if heading in ("items", "predicted", "real", "ratio") else "left")
    for each in found:
        show = humanize.duration if each.what == "time" else humanize.size
        table.add_row(
            each.model,
            f"{each.items:,}",
            each.what,
            each.measured,
            show(each.predicted),
            show(each.real),
            f"{each.predicted / max(1e-9, each.real):.3f}",
            Text("MISSED", "bold red") if each.ratio > _TARGET else Text("met", "green"),
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dry_run", description=__doc__)
    parser.add_argument("--model", action="append", choices=_TEXTS, help="may be repeated; default: both")
    parser.add_argument("--items", action="append", type=int, metavar="N", help=f"default: {_ITEMS}")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if a ratio is above {_TARGET:g} either way")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
