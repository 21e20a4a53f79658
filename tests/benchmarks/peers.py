"""Other ways to embed docstrings with all-MiniLM-L6-v2 on the CPU, in turn with this encoder: `make bench-peers`.

They are `SentenceTransformer.encode` by default and with its best batch size, and Ray Data and Daft where they are
installed. Each one's rate is also shown as a fraction of the roof: the tokens per second that the measured rate of
matrix products would allow. Padding isn't counted as work.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentence_transformers import SentenceTransformer

from tests.benchmarks.corpus import distinct_docstrings
from tests.benchmarks.harness import Rounds, Values
from tests.benchmarks.machine import model_folder
from tests.benchmarks.roofline import MatrixProduct, flops_per_token
from workers.encoders.local import LocalEncoder

_POOL = 10_000
_BATCHES = (8, 16, 32, 64, 128)
_TRIED = 128
#: Texts with which Ray's actors all have a batch.
_FEW = 128
_MATRIX = 1_024
_ROOF = "roof by sgemm"
_INSTALLS = {"ray": "pip install 'ray[data]'", "daft": "pip install daft"}
_CALM = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DAFT_ANALYTICS_ENABLED": "0",
}


def main() -> int:
    """Measure, and print the table."""
    arguments = _arguments()
    os.environ |= _CALM
    progress = Console(stderr=True, highlight=False)

    def show(number: int, side: str, value: float) -> None:
        progress.print(f"  round {number + 1}  {side} {value:,.0f} tokens/s", style="dim")

    absent = {name: why for name in _INSTALLS if (why := _why_not(name))}
    peers = [name for name in _INSTALLS if name not in absent]
    values = measure(Rounds(arguments.rounds, show), arguments.texts, peers)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(_table(values, absent))
    return 0


def measure(rounds: Rounds, sample: int, peers: list[str]) -> Values:
    """Return tokens per second of all that can be measured, on another random sample of docstrings each round."""
    texts = distinct_docstrings(_POOL)
    samples = [random.Random(number).sample(texts, _FEW + sample) for number in range(rounds.count)]
    ours = LocalEncoder(model_folder(), "cpu", threads=os.cpu_count())
    theirs = SentenceTransformer(
        str(model_folder()), device="cpu", model_kwargs={"use_safetensors": True, "torch_dtype": torch.float32}
    )
    lengths = [ours.tokenise(some).lengths for some in samples]
    product, flops = MatrixProduct("cpu", torch.float32, _MATRIX), flops_per_token(model_folder())

    def encoder(some: list[str]) -> None:
        ours.encode(ours.tokenise(some))

    def library(batch: int) -> Callable[[list[str]], None]:
        return lambda some: theirs.encode(some, batch_size=batch, show_progress_bar=False)

    def timed(embed: Callable[[list[str]], None]) -> Callable[[int], float]:
        return lambda number: int(lengths[number].sum()) / _seconds(embed, samples[number])

    def peer(name: str) -> Callable[[int], float]:
        return lambda number: int(lengths[number][_FEW:].sum()) / _peer_seconds(name, samples[number])

    # Trials warm up, too.
    trials = {batch: _seconds(library(batch), texts[:_TRIED]) for batch in _BATCHES}
    best = min(trials, key=trials.__getitem__)
    encoder(texts[:_TRIED])
    return rounds.interleave(
        {
            "vectormill": timed(encoder),
            "encode, batches of 32": timed(library(32)),
            f"encode, batches of {best}, its best": timed(library(best)),
            **{name: peer(name) for name in peers},
            _ROOF: lambda _: product.flops_per_second() / flops,
        }
    )


def _seconds(embed: Callable[[list[str]], None], texts: list[str]) -> float:
    start = perf_counter()
    embed(texts)
    return perf_counter() - start


def _why_not(name: str) -> str:
    """Return why another library has no row; empty if it runs here."""
    if find_spec(name) is None:
        return f"not installed: {_INSTALLS[name]}"
    try:
        _peer_seconds(name, distinct_docstrings(2 * _FEW))
    except subprocess.CalledProcessError as error:
        return f"failed: {error.stderr.strip().splitlines()[-1]}"
    return ""


def _peer_seconds(name: str, texts: list[str]) -> float:
    """Return the seconds that another library takes for all texts but the first few."""
    command = [sys.executable, "-m", "tests.benchmarks.peer", name, str(model_folder()), str(_FEW)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _table(values: Values, absent: dict[str, str]) -> Table:
    medians = {name: median(series) for name, series in values.items()}
    ours, roof = medians["vectormill"], medians[_ROOF]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("docstrings, all-MiniLM-L6-v2, float32")
    for heading in ("tokens/s", "vectormill is", "of roof"):
        table.add_column(heading, justify="right")
    for name, rate in medians.items():
        table.add_row(name, f"{rate:,.0f}", f"{ours / rate:.2f} ×", f"{rate / roof:.0%}")
    for name, why in absent.items():
        table.add_row(name, Text(why))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured; default: 5")
    parser.add_argument("--texts", type=int, default=500, help="docstrings that are embedded each time; default: 500")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
