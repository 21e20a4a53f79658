"""Rates of one model on texts of one kind, by this encoder and by `SentenceTransformer.encode`, and their vectors."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer

from tests.benchmarks.vectors import LEAST_COSINE, Vectors, least_cosine
from workers.encoders.batching import Tokenised
from workers.encoders.local import LocalEncoder

DTYPES = ("float32", "float16", "bfloat16")
#: The library's default, and one that keeps a GPU busier.
_BATCHES = (32, 256)
_MOST_ROUNDS = 5
#: Most of a single measurement.
_MOST_SECONDS = 3.0
#: Part of a measurement's time, from which on a trial tells how many texts fill it.
_TELLING = 0.25
_COMPARED = 128

AHEAD, OURS, TOKENISING = "ours, bfloat16, tokenised ahead", "ours, bfloat16", "tokenising alone, on one core"
#: Embeds, or only tokenises, the first n texts.
Side = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of a measurement."""

    #: Medians of tokens per second.
    rates: Mapping[str, float]
    rounds: int
    tokens_per_text: float
    #: Least cosines of a text's two vectors.
    cosines: Mapping[str, float]
    #: True if in float32 both libraries have the same vectors.
    equal: bool


class Contenders:
    """A model, loaded by both libraries in all precisions that are compared."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self._ours = {dtype: LocalEncoder(folder, device, precision=dtype) for dtype in ("float32", "bfloat16")}
        self._theirs = {
            dtype: SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "torch_dtype": getattr(torch, dtype)},
            )
            for dtype in DTYPES
        }

    def measure(self, texts: list[str], seconds: float) -> Row:
        """Measure all sides in turn for about so many seconds in all, at least once each."""
        until = monotonic() + seconds
        tokenised = self._ours["bfloat16"].tokenise(texts)
        cosines, equal = self._compare(texts[:_COMPARED])
        sides = self._sides(texts, tokenised)
        each = min(_MOST_SECONDS, seconds / (4 * len(sides)))
        values = _rounds(sides, np.cumsum(tokenised.lengths, dtype=np.int64), each, until)
        return Row(
            rates={name: median(series) for name, series in values.items()},
            rounds=len(values[OURS]),
            tokens_per_text=float(tokenised.lengths.mean()),
            cosines=cosines,
            equal=equal,
        )

    def _sides(self, texts: list[str], tokenised: Tokenised) -> dict[str, Side]:
        ours = self._ours["bfloat16"]

        def ahead(count: int) -> object:
            return ours.encode(Tokenised(tokenised.ids[:count], tokenised.lengths[:count], tokenised.truncated[:count]))

        def tokenise(count: int) -> object:
            with _one_core():
                return ours.tokenise(texts[:count])

        def encode(dtype: str, batch: int) -> Side:
            return lambda count: self._encode(dtype, texts[:count], batch)

        return {
            AHEAD: ahead,
            OURS: lambda count: ours.encode(ours.tokenise(texts[:count])),
            **{f"encode, {dtype}, batches of {n}": encode(dtype, n) for dtype in DTYPES for n in _BATCHES},
            TOKENISING: tokenise,
        }

    def _encode(self, dtype: str, texts: list[str], batch: int) -> Vectors:
        return np.asarray(self._theirs[dtype].encode(texts, batch_size=batch, show_progress_bar=False), np.float32)

    def _compare(self, texts: list[str]) -> tuple[dict[str, float], bool]:
        ours = {dtype: encoder.encode(encoder.tokenise(texts)) for dtype, encoder in self._ours.items()}
        theirs = {dtype: self._encode(dtype, texts, _BATCHES[0]) for dtype in ("float32", "bfloat16")}
        exact = least_cosine(ours["float32"], theirs["float32"])
        cosines = {
            "float32 to encode's": exact,
            "bfloat16 to encode's in bfloat16": least_cosine(ours["bfloat16"], theirs["bfloat16"]),
            "bfloat16 to encode's in float32": least_cosine(ours["bfloat16"], theirs["float32"]),
            "encode's bfloat16 to its float32": least_cosine(theirs["bfloat16"], theirs["float32"]),
        }
        return cosines, exact >= LEAST_COSINE


def _rounds(
    sides: Mapping[str, Side], ends: npt.NDArray[np.int64], seconds: float, until: float
) -> dict[str, list[float]]:
    """Return tokens per second by round. Each side gets as many of the texts, from the first, as fill `seconds`; `ends`
    are the tokens up to each text."""
    counts = {name: _fitting(side, len(ends), seconds) for name, side in sides.items()}
    values: dict[str, list[float]] = {name: [] for name in sides}
    taken = 0.0
    for number in range(_MOST_ROUNDS):
        began = monotonic()
        if number and began + taken > until:
            break
        for name, side in sides.items():
            values[name].append(int(ends[counts[name] - 1]) / _seconds(side, counts[name]))
        taken = monotonic() - began
    return values


def _fitting(side: Side, most: int, seconds: float) -> int:
    """Return how many texts fill `seconds`, found by ever longer trials, which warm up too."""
    count = min(32, most)
    while (taken := _seconds(side, count)) < _TELLING * seconds and count < most:
        count = min(4 * count, most)
    return max(1, min(most, round(count * seconds / taken)))


def _seconds(side: Side, count: int) -> float:
    start = perf_counter()
    side(count)
    return perf_counter() - start


@contextmanager
def _one_core() -> Iterator[None]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
