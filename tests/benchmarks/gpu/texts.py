"""Kinds of texts by their lengths in tokens."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tests.benchmarks.gpu.models import MOST_TOKENS, tokenizer
from tests.benchmarks.running_text import RunningText

Lengths = npt.NDArray[np.int64]


def _mixed(random: np.random.Generator, count: int) -> Lengths:
    return np.clip(random.lognormal(np.log(90), 0.8, count), 8, MOST_TOKENS).astype(np.int64)


SHORT, MIXED, LONG, LONGEST = "short texts", "mixed texts", "256 tokens", "512 tokens"
_LENGTHS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    SHORT: lambda random, count: random.integers(12, 21, count),
    MIXED: _mixed,
    LONG: lambda _, count: np.full(count, 256),
    LONGEST: lambda _, count: np.full(count, 512),
}


class Texts:
    """Maker of texts."""

    def __init__(self) -> None:
        self._source = RunningText(tokenizer())

    def of(self, kind: str, tokens: int, least: int) -> list[str]:
        """Return texts of a kind with about so many tokens together, and not fewer than `least`."""
        random = np.random.default_rng(0)
        mean = float(_LENGTHS[kind](random, 1_000).mean())
        return self._source.cut(_LENGTHS[kind](random, max(least, round(tokens / mean))).tolist())
