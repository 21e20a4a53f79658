"""Cost estimate of a job, from a sample of its texts. Nothing is written."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.core.chunks import Extent
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.ingest.submit import check
from pipeline.sources import Corpus, Source
from pipeline.sources.by_reference import read_extent

T = TypeVar("T")

#: Number of texts that are tokenised.
_SAMPLE = 2_000
#: Consecutive rows of a file that are sampled together.
_RUN = 50
#: Most rows whose texts are compared to find duplicates.
_COMPARED = 5_000_000
#: 95 % of a normal distribution lie within this many standard deviations.
_DEVIATIONS = 1.96
_PAGE_BYTES = 8_192
#: Longest row stored inline by Postgres, in bytes, and the size of the out-of-line (TOAST) pieces of a longer one.
_INLINE_BYTES, _PIECE_BYTES = 2_032, 1_996

#: Token counter: texts and the most tokens of a text → (tokens of each, True where it was truncated).
Tokenise = Callable[[Sequence[str], int | None], tuple[Sequence[int], Sequence[bool]]]


@dataclass(slots=True)
class _Reservoir(Generic[T]):
    """Reservoir sampling: a uniform sample of a stream."""

    size: int
    kept: list[T] = field(default_factory=list)
    seen: int = 0
    #: Seeded, so that an estimate is reproducible.
    choose: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311  # nosec B311

    def offer(self, value: T) -> None:
        """Offer the stream's next value to the sample."""
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(value)
        elif (at := self.choose.randrange(self.seen)) < self.size:
            self.kept[at] = value


@dataclass(slots=True)
class _Sample:
    """Counts and sampled texts of a corpus."""

    items: int = 0
    #: Rejects among all items, or, by reference, among those read.
    rejected: int = 0
    read: int = 0
    texts: list[bytes] = field(default_factory=list)
    key_bytes: int = 0
    #: Rows compared, and the number of different texts among them.
    compared: int = 0
    different: int = 0


def estimate(corpus: Source, model: Model, options: JobOptions, slots: int, tokenise: Tokenise) -> dict[str, Any]:
    """Estimate a job without submitting it: items, tokens (95 % interval), duplicates, truncation, time and size.

    Args:
        corpus: the texts to embed; read whole, or, by reference, only located, with a few rows read.
        model: the model that would embed them.
        options: the job's options.
        slots: the number of slots that would work on it; 0 counts as one.
        tokenise: counts tokens as the model reads them.

    Raises: the errors that submitting would raise.
    """
    check(options, corpus, model)
    by_reference = options.by_reference and isinstance(corpus, Corpus)
    sample = _sample_files(corpus) if by_reference and isinstance(corpus, Corpus) else _sample_rows(corpus)
    good = round(sample.items * (1 - sample.rejected / max(1, sample.read)))
    bounds = [bound for bound in (options.max_item_tokens, model.max_item_tokens) if bound]
    lengths, cut = tokenise([text.decode() for text in sample.texts], min(bounds, default=None))
    counts = np.asarray(lengths, dtype=np.float64)
    mean = float(counts.mean()) if len(counts) else 0.0
    margin = _DEVIATIONS * float(counts.std(ddof=1)) / sqrt(len(counts)) if 1 < len(counts) < good else 0.0
    tokens = mean * good
    rate = model.tokens_per_second * max(1, slots)
    return {
        "items": {"total": sample.items, "rejected": sample.items - good},
        "tokens": {
            "total": round(tokens),
            "low": round(max(0.0, mean - margin) * good),
            "high": round((mean + margin) * good),
            "mean": round(mean, 1),
            "sampled_items": len(counts),
        },
        "duplicates": {
            "share": round(1 - sample.different / sample.compared, 4) if sample.compared else 0.0,
            "compared_items": sample.compared,
        },
        "truncated": {"share": round(float(np.mean(cut)), 4) if len(counts) else 0.0},
        "time": {"seconds": round(tokens / rate, 1), "slots": slots, "tokens_per_second": round(rate, 1)},
        "bytes": _bytes(sample, good, options, options.dimensions or model.dimensions, by_reference=by_reference),
        "by_reference": by_reference,
        "notices": corpus.notices.lines(),
    }


def _sample_rows(corpus: Source) -> _Sample:
    """Read every row, count all, and keep a few texts."""
    sample = _Sample()
    chosen: _Reservoir[bytes] = _Reservoir(_SAMPLE)
    hashes: set[int] = set()
    for rows in corpus.blocks():
        sample.items += len(rows.keys)
        sample.rejected += len(rows.problems)
        for key, text in zip(rows.keys, rows.texts, strict=True):
            if text is None:
                continue
            chosen.offer(text)
            sample.key_bytes += len(key or "")
            if sample.compared < _COMPARED:
                hashes.add(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
                sample.compared += 1
    sample.read, sample.texts, sample.different = sample.items, chosen.kept, len(hashes)
    sample.key_bytes //= max(1, chosen.seen)
    return sample


def _sample_files(corpus: Corpus) -> _Sample:
    """Count rows by their places in the files, and read a few runs of them."""
    sample = _Sample()
    chosen: _Reservoir[tuple[Extent, int]] = _Reservoir(_SAMPLE // _RUN)
    for extent, count in _runs(corpus):
        sample.items += count
        chosen.offer((extent, count))
    for extent, count in chosen.kept:
        for rows in read_extent(extent, count, corpus.columns, corpus.item_bytes):
            sample.read += len(rows.keys)
            sample.rejected += len(rows.problems)
            sample.texts += [text for text in rows.texts if text is not None]
            sample.key_bytes += sum(len(key or "") for key in rows.keys)
    sample.compared, sample.different = len(sample.texts), len(set(sample.texts))
    sample.key_bytes //= max(1, sample.read)
    return sample


def _runs(corpus: Corpus) -> Iterator[tuple[Extent, int]]:
    for file in corpus.files:
        for places in corpus.places(file):
            for start in range(0, len(places.sizes), _RUN):
                end = min(start + _RUN, len(places.sizes))
                yield places.extent(file, start, places, end - 1), end - start


def _bytes(sample: _Sample, good: int, options: JobOptions, dimensions: int, *, by_reference: bool) -> dict[str, int]:
    """Return the bytes that the job would take in Postgres and in Parquet."""
    vector = dimensions * options.dtype.element_bytes
    text = sum(map(len, sample.texts)) // max(1, len(sample.texts))
    postgres = 0 if by_reference else sample.items * (text + sample.key_bytes + 90)
    if options.output:
        return {"postgres": postgres, "parquet": good * (vector + sample.key_bytes + 8)}
    return {"postgres": postgres + good * _row_bytes(vector, sample.key_bytes), "parquet": 0}


def _row_bytes(vector: int, key: int) -> int:
    """Return the bytes of an embedding's row, with its share of the index and of unfilled pages."""
    index = 45
    row = 24 + 45 + key + vector + 8
    if row <= _INLINE_BYTES:
        return ceil(_PAGE_BYTES / max(1, _PAGE_BYTES // row)) + index
    pieces = ceil(vector / _PIECE_BYTES)
    return ceil(pieces * _PAGE_BYTES / 4) + pieces * 30 + 100 + key + index
