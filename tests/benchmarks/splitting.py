"""Splitting of long texts into passages and embedding them, against embedding the passages alone, in one process with
the same threads."""

import os
import random
from itertools import groupby, islice
from time import perf_counter

from pipeline.cli.demo import docstrings
from pipeline.core.options import SplitBy
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import model_folder

_TEXTS, _SAMPLE = 600, 40
_LEAST_CHARACTERS = 2_000
_TOKENS, _OVERLAP = 256, 32


def long_texts(count: int) -> list[str]:
    """Return so many texts: all docstrings of a module, where they are long."""
    modules = groupby(docstrings(), key=lambda doc: doc[0].partition(":")[0])
    texts = ("\n\n".join(text for _, text in docs) for _, docs in modules)
    return list(islice((text for text in texts if len(text) >= _LEAST_CHARACTERS), count))


def measure(rounds: Rounds) -> Values:
    """Return tokens per second of both, on another random sample each round."""
    # Imported here since the other benchmarks need no torch.
    from workers.encoders.batching import SplitRule
    from workers.encoders.local import LocalEncoder

    texts = long_texts(_TEXTS)
    samples = [random.Random(number).sample(texts, _SAMPLE) for number in range(rounds.count)]
    encoder, rule = LocalEncoder(model_folder(), "cpu", threads=os.cpu_count()), SplitRule(_TOKENS, _OVERLAP)
    assert rule.by is SplitBy.PARAGRAPH
    passages: dict[int, list[str]] = {}

    def split(number: int) -> float:
        start = perf_counter()
        some = samples[number]
        spans = encoder.split(some, [""] * len(some), rule)
        passages[number] = [text[begin:end] for text, parts in zip(some, spans, strict=True) for begin, end in parts]
        return embedded(number, start)

    def embedded(number: int, start: float) -> float:
        tokenised = encoder.tokenise(passages[number])
        encoder.encode(tokenised)
        return int(tokenised.lengths.sum()) / (perf_counter() - start)

    encoder.encode(encoder.tokenise(texts[0].split("\n\n")[:32]))
    return rounds.interleave({"split": split, "whole passages": lambda number: embedded(number, perf_counter())})


BENCHMARK = Benchmark(name="splitting_vs_passages_alone", target=0.9, unit="tokens/s", measure=measure)
