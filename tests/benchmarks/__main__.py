"""Runner of the benchmarks: prints a table, and writes `bench-results.json` here. See `--help`."""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from tests.benchmarks import (
    children,
    engine,
    fairness,
    gateway,
    job,
    memory,
    repeats,
    scale,
    splitting,
    static_job,
    strangers,
    submit_memory,
    submit_rate,
    sync,
    two_encoders,
    write_back,
)
from tests.benchmarks.harness import Benchmark, Result, Rounds, result_table, use_default_settings, write_results

_BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        job.BENCHMARK,
        *engine.BENCHMARKS,
        *(
            module.BENCHMARK
            for module in (splitting, repeats, sync, static_job, write_back, submit_rate, submit_memory, fairness)
        ),
        *gateway.BENCHMARKS,
        two_encoders.BENCHMARK,
        *children.BENCHMARKS,
        *scale.BENCHMARKS,
        *strangers.BENCHMARKS,
        *memory.BENCHMARKS,
    )
}
_LEAST_ROUNDS = 5
_RESULTS = Path("bench-results.json")


def main() -> int:
    """Run the benchmarks. Return exit code 0, or with `--check` 1 if a target was missed."""
    arguments = _arguments()
    use_default_settings()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    progress, results = Console(stderr=True, highlight=False), []
    for name in arguments.only or _BENCHMARKS:
        results.append(_run(_BENCHMARKS[name], arguments.rounds, progress))
        write_results(_RESULTS, results)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(result_table(results))
    return int(arguments.check and any(result.missed for result in results))


def _run(benchmark: Benchmark, rounds: int, progress: Console) -> Result:
    progress.print(f"{benchmark.name}: {rounds} rounds")

    def show(number: int, side: str, value: float) -> None:
        progress.print(f"  round {number + 1}  {side} {value:,.1f} {benchmark.unit}", style="dim")

    return Result(benchmark, benchmark.measure(Rounds(rounds, show)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure vectormill.")
    parser.add_argument(
        "--rounds", type=_rounds, default=_LEAST_ROUNDS, metavar="N", help="how often each side is measured, at least 5"
    )
    parser.add_argument(
        "--only", action="append", choices=_BENCHMARKS, metavar="NAME", help=f"one of {', '.join(_BENCHMARKS)}"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def _rounds(value: str) -> int:
    if not value.isdigit() or int(value) < _LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{value}: give a number from {_LEAST_ROUNDS} on")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
