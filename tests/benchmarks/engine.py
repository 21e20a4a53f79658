"""Encoder against `SentenceTransformer.encode` of the same model, in one process with the same threads."""

import os
import random
from time import perf_counter

import numpy as np
import numpy.typing as npt

from tests.benchmarks.corpus import distinct_docstrings
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import model_folder

_POOL = 10_000
_SAMPLE = 500
_WARM_UP = 64
_LIBRARY_BATCH = 32
_LEAST_COSINE = 0.99999

Vectors = npt.NDArray[np.float32]


def measure(rounds: Rounds) -> Values:
    """Return texts per second of both, on another random sample each round.

    Raises:
        AssertionError: their vectors differ.
    """
    # Imported here since the other benchmarks need no torch.
    import torch
    from sentence_transformers import SentenceTransformer

    from workers.encoders.local import LocalEncoder

    texts = distinct_docstrings(_POOL)
    samples = [random.Random(number).sample(texts, _SAMPLE) for number in range(rounds.count)]
    ours = LocalEncoder(model_folder(), "cpu", threads=os.cpu_count())
    theirs = SentenceTransformer(
        str(model_folder()), device="cpu", model_kwargs={"use_safetensors": True, "torch_dtype": torch.float32}
    )
    made: dict[int, Vectors] = {}

    def encoder(number: int) -> float:
        start = perf_counter()
        made[number] = ours.encode(ours.tokenise(samples[number]))
        return _SAMPLE / (perf_counter() - start)

    def library(number: int) -> float:
        start = perf_counter()
        vectors = theirs.encode(samples[number], batch_size=_LIBRARY_BATCH, show_progress_bar=False)
        seconds = perf_counter() - start
        assert _least_cosine(made[number], vectors) >= _LEAST_COSINE
        return _SAMPLE / seconds

    warm_up = texts[:_WARM_UP]
    ours.encode(ours.tokenise(warm_up))
    theirs.encode(warm_up, batch_size=_LIBRARY_BATCH, show_progress_bar=False)
    return rounds.interleave({"encoder": encoder, "sentence-transformers": library})


def _least_cosine(ours: Vectors, theirs: Vectors) -> float:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.min())


BENCHMARK = Benchmark(name="engine_vs_sentence_transformers", target=1.3, unit="items/s", measure=measure)
