"""Encoder against `SentenceTransformer.encode` of the same model, in one process with the same threads: docstrings,
running text, and texts of one length, where sorting by length and leaving padding out gain nothing."""

import os
import random
from collections.abc import Callable
from functools import partial
from time import perf_counter

from tests.benchmarks.corpus import distinct_docstrings, running_texts
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import model_folder
from tests.benchmarks.vectors import LEAST_COSINE, Vectors, least_cosine
from workers.encoders.imports import import_library

_DOCSTRINGS = 10_000
_UNIFORM_TEXTS, _UNIFORM_TOKENS = 2_000, 128
_WARM_UP = 64
_LIBRARY_BATCH = 32
_MATRIX = 1_024


def measure(pool: Callable[[], list[str]], sample: int, rounds: Rounds) -> Values:
    """Return tokens per second of both, on another random sample of the pool each round; and for information, those
    that the rate of matrix products would allow.

    Raises:
        AssertionError: their vectors differ.
    """
    # Imported here since the other benchmarks need no torch; first as workers do.
    import_library()
    import torch
    from sentence_transformers import SentenceTransformer

    from tests.benchmarks.roofline import MatrixProduct, flops_per_token
    from workers.encoders.local import LocalEncoder

    texts = pool()
    samples = [random.Random(number).sample(texts, sample) for number in range(rounds.count)]
    ours = LocalEncoder(model_folder(), "cpu", threads=os.cpu_count())
    theirs = SentenceTransformer(
        str(model_folder()), device="cpu", model_kwargs={"use_safetensors": True, "torch_dtype": torch.float32}
    )
    tokens = [int(ours.tokenise(some).lengths.sum()) for some in samples]
    product, flops = MatrixProduct("cpu", torch.float32, _MATRIX), flops_per_token(model_folder())
    made: dict[int, Vectors] = {}

    def encoder(number: int) -> float:
        start = perf_counter()
        made[number] = ours.encode(ours.tokenise(samples[number]))
        return tokens[number] / (perf_counter() - start)

    def library(number: int) -> float:
        start = perf_counter()
        vectors = theirs.encode(samples[number], batch_size=_LIBRARY_BATCH, show_progress_bar=False)
        seconds = perf_counter() - start
        assert least_cosine(made[number], vectors) >= LEAST_COSINE
        return tokens[number] / seconds

    warm_up = texts[:_WARM_UP]
    ours.encode(ours.tokenise(warm_up))
    theirs.encode(warm_up, batch_size=_LIBRARY_BATCH, show_progress_bar=False)
    return rounds.interleave(
        {
            "encoder": encoder,
            "sentence-transformers": library,
            "roof by sgemm": lambda _: product.flops_per_second() / flops,
        }
    )


def uniform_texts() -> list[str]:
    """Return texts of the same number of tokens for the bundled model."""
    from tokenizers import Tokenizer

    from tests.benchmarks.running_text import RunningText

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    return RunningText(tokenizer).cut([_UNIFORM_TOKENS] * _UNIFORM_TEXTS)


def _benchmark(kind: str, target: float, pool: Callable[[], list[str]], sample: int) -> Benchmark:
    name = f"engine_vs_sentence_transformers{kind}"
    return Benchmark(name=name, target=target, unit="tokens/s", measure=partial(measure, pool, sample))


BENCHMARKS = (
    _benchmark("", 1.6, partial(distinct_docstrings, _DOCSTRINGS), 500),
    _benchmark("_prose", 1.3, partial(running_texts, 500), 250),
    _benchmark("_uniform", 1.1, uniform_texts, 300),
)
