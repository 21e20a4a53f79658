"""Two encoders on the same cores, each with a thread for each core, against two whose waiting threads spin as long as
libgomp lets them by itself."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.bare import bare_engine, turn
from tests.benchmarks.corpus import distinct_docstrings
from tests.benchmarks.harness import Benchmark, Rounds, Values
from workers.encoders.imports import SPIN_VARIABLE

_TEXTS = 200
_ITS_ROUNDS = "300000"


def measure(rounds: Rounds) -> Values:
    """Return texts per second of both together."""
    texts = distinct_docstrings(_TEXTS)

    def pair(environment: dict[str, str], _: int) -> float:
        with TemporaryDirectory() as folder, ExitStack() as stack, ThreadPoolExecutor(2) as threads:
            path = Path(folder, "texts.json")
            engines = [stack.enter_context(bare_engine(path, texts, environment=environment)) for _ in range(2)]
            return sum(_TEXTS / seconds for seconds in threads.map(turn, engines))

    return rounds.interleave(
        {"two encoders": partial(pair, {}), "by libgomp's default": partial(pair, {SPIN_VARIABLE: _ITS_ROUNDS})}
    )


BENCHMARK = Benchmark(name="two_encoders_vs_spinning", target=1.5, unit="texts/s", measure=measure)
