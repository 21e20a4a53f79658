"""Job on a corpus of which 30 % repeat a text before them, against the same with `--no-reuse`."""

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from pipeline.core.options import JobOptions
from tests.benchmarks.corpus import distinct_docstrings, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.job import job_seconds, warm_up
from tests.benchmarks.machine import connected, forget_jobs, whole_machine

_ROWS = 3_000
_REPEATED = 0.3


def measure(rounds: Rounds) -> Values:
    """Return items per second of both, each with no vector there before."""
    choose = Random(30)
    texts = distinct_docstrings(round(_ROWS * (1 - _REPEATED)))
    texts += choose.choices(texts, k=_ROWS - len(texts))
    choose.shuffle(texts)
    with TemporaryDirectory() as folder, whole_machine() as running, connected(running) as place:
        corpus = write_rows(Path(folder, "corpus.jsonl"), [(f"doc-{n}", body) for n, body in enumerate(texts)])
        warm_up(place, folder, texts)

        def rate(options: JobOptions) -> float:
            forget_jobs(place)
            return _ROWS / job_seconds(place, corpus, _ROWS, options)

        return rounds.interleave(
            {"reuse": lambda _: rate(JobOptions()), "no reuse": lambda _: rate(JobOptions(reuse=False))}
        )


BENCHMARK = Benchmark(name="repeats_vs_no_reuse", target=1.35, unit="items/s", measure=measure)
