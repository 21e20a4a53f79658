"""Estimate of a job by a dry run: items and tokens from a sample of its texts; time, size and cost from measured rates.
Nothing stays."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from time import perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import Extent
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.infra.storage import is_remote
from pipeline.ingest.chunking import chunk_tokens
from pipeline.ingest.prediction import Load, Measured, Pieces, Rates, RowCost, predict
from pipeline.ingest.row_costs import SampleRow
from pipeline.ingest.submission import Planning
from pipeline.ingest.submit import check
from pipeline.sources import Corpus, Rows, Source
from pipeline.sources.by_reference import read_extent

T = TypeVar("T")

#: Number of texts that are tokenised.
_SAMPLE = 2_000
#: Consecutive rows of a file that are sampled together.
_RUN = 50
#: Most rows whose texts are compared to find duplicates.
_COMPARED = 5_000_000
_SHOWN_PASSAGES = 3
#: 95 % of a normal distribution lie within this many standard deviations.
_DEVIATIONS = 1.96


class Tokens(NamedTuple):
    """Tokens of each sampled text, or passage, as the model reads it."""

    lengths: Sequence[int]
    #: True where it was truncated, and the tokens that this lost.
    truncated: Sequence[bool]
    lost: Sequence[int]
    #: Passages of each text, `text[start:stop]`; `None`: texts aren't split.
    spans: Sequence[Sequence[tuple[int, int]]] | None = None

    @property
    def rows(self) -> float:
        """Vectors of a text, on average."""
        return 1.0 if self.spans is None else sum(map(len, self.spans)) / max(1, len(self.spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Measurement of a corpus's sample."""

    tokens: Tokens
    rates: Rates
    #: Cost of staging an item, and of writing a vector.
    item: RowCost
    vector: RowCost


#: Measures sampled rows, for a job of about so many items.
Measure = Callable[[Sequence[SampleRow], int], Measurement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Slots and devices of the live workers that serve a model, and the limits of chunks."""

    slots: int
    devices: int
    planning: Planning


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
    """Counts and sampled rows of a corpus."""

    items: int = 0
    #: Rejects among all items, or, by reference, among those read.
    rejected: int = 0
    read: int = 0
    rows: list[SampleRow] = field(default_factory=list)
    #: Rows compared, and the number of different texts among them.
    compared: int = 0
    different: int = 0
    #: Time to read all rows, or, by reference, to locate them.
    seconds: float = 0.0


def estimate(
    corpus: Source,
    model: Model,
    options: JobOptions,
    fleet: Fleet,
    measure: Measure,
    *,
    price_per_million: float | None = None,
    at: int | None = None,
) -> dict[str, Any]:
    """Estimate a job without submitting it: items, tokens (95 % interval), duplicates, truncation, time, size and cost.

    Args:
        corpus: the texts to embed; read whole, or, by reference, only located, with a few rows read.
        model: the model that would embed them.
        options: the job's options.
        fleet: the workers; without any, one slot is assumed.
        measure: measures a sample of the rows.
        price_per_million: price of a million tokens.
        at: the number of items to scale the corpus to.

    Raises: the errors that submitting would raise.
    """
    check(options, corpus, model)
    by_reference = options.by_reference and isinstance(corpus, Corpus)
    sample = _sample_files(corpus) if by_reference and isinstance(corpus, Corpus) else _sample_rows(corpus)
    items = at if at is not None and sample.items else sample.items
    good = round(items * (1 - sample.rejected / max(1, sample.read)))
    measured = measure(sample.rows, good)
    counts = _of_texts(measured.tokens)
    mean = float(counts.mean()) if len(counts) else 0.0
    margin = _DEVIATIONS * float(counts.std(ddof=1)) / sqrt(len(counts)) if 1 < len(counts) < good else 0.0
    vectors = round(good * measured.tokens.rows)
    # Equal texts are embedded once; with files it depends on where they lie.
    once = options.reuse and not options.output
    embedded = sample.different / sample.compared if once and sample.compared else 1.0
    load = Load(
        items=items,
        vectors=vectors,
        tokens=mean * good * embedded,
        reading_seconds=sample.seconds * items / max(1, sample.items),
        slots=max(1, fleet.slots),
        devices=max(1, fleet.devices),
        chunk_items=fleet.planning.chunk_items,
        chunk_tokens=chunk_tokens(fleet.planning.chunk_seconds, model.tokens_per_second),
        price_per_million=price_per_million,
    )
    pieces = predict(load, measured.rates, measured.item, measured.vector)
    return {
        "at": at,
        "items": {"total": items, "rejected": items - good},
        "tokens": {
            "total": round(mean * good),
            "low": round(max(0.0, mean - margin) * good),
            "high": round((mean + margin) * good),
            "mean": round(mean, 1),
            "sampled_items": len(counts),
        },
        "duplicates": {
            "share": round(1 - sample.different / sample.compared, 4) if sample.compared else 0.0,
            "compared_items": sample.compared,
        },
        "truncated": _truncated(measured.tokens, good),
        "passages": _passages(measured.tokens, sample.rows, vectors),
        "time": {"seconds": round(pieces.seconds, 1), "slots": fleet.slots, **_rates(measured.rates, load, pieces)},
        "bytes": {
            "postgres": round(pieces.disk_bytes - vectors * measured.vector.parquet_bytes),
            "parquet": round(vectors * measured.vector.parquet_bytes),
        },
        "pieces": _pieces(pieces),
        "by_reference": by_reference,
        "embedded_once": once,
        "notices": [*corpus.notices.lines(), *_not_predicted(options, measured.rates)],
    }


def _of_texts(tokens: Tokens) -> npt.NDArray[np.float64]:
    """Return the tokens of each sampled text, those of all its passages together."""
    counts = np.asarray(tokens.lengths, dtype=np.float64)
    if tokens.spans is None or not len(tokens.spans):
        return counts
    owner = np.repeat(np.arange(len(tokens.spans)), [len(spans) for spans in tokens.spans])
    return np.bincount(owner, weights=counts, minlength=len(tokens.spans)).astype(np.float64)


def _truncated(tokens: Tokens, good: int) -> dict[str, Any]:
    """Return the share of texts that would be truncated, and the tokens that the job would lose."""
    share = float(np.mean(tokens.truncated)) if len(tokens.truncated) else 0.0
    lost = float(np.mean(tokens.lost)) if len(tokens.lost) else 0.0
    return {"share": round(share, 4), "lost_tokens": round(lost * good)}


def _passages(tokens: Tokens, rows: Sequence[SampleRow], vectors: int) -> dict[str, Any] | None:
    """Return the number of passages, and a few of them; `None` if texts aren't split."""
    if tokens.spans is None:
        return None
    shown: list[dict[str, Any]] = []
    before = 0
    for row, spans in zip(rows, tokens.spans, strict=False):
        if spans and len(shown) < _SHOWN_PASSAGES:
            at = len(spans) // 2
            start, stop = spans[at]
            shown.append(
                {
                    "key": row.key,
                    "passage": at,
                    "start": start,
                    "stop": stop,
                    "tokens": tokens.lengths[before + at],
                    "text": row.text.decode()[start:stop],
                }
            )
        before += len(spans)
    return {"total": vectors, "mean": round(tokens.rows, 2), "sample": shown}


def _not_predicted(options: JobOptions, rates: Rates) -> Iterator[str]:
    if options.into:
        index = " and its index" if options.hnsw else ""
        yield f"the vectors in {options.into}{index} are neither in this estimate's time nor in its size."
    if options.output and is_remote(options.output) and rates.measured is not Measured.WORKERS:
        yield f"the way to {options.output} isn't in this estimate's time: files were written here."


def _rates(rates: Rates, load: Load, pieces: Pieces) -> dict[str, Any]:
    working = pieces.embed_seconds + pieces.write_seconds
    return {
        "tokens_per_second": round(load.tokens / working, 1) if working else 0.0,
        "measured": rates.measured.value,
        "measured_seconds": round(rates.seconds, 1),
        "device": rates.device or None,
    }


def _pieces(pieces: Pieces) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in asdict(pieces).items():
        if value is None:
            found[name] = None
        elif name.endswith("_bytes"):
            found[name] = round(value)
        else:
            found[name] = round(value, 6 if name == "cost" else 3)
    return found


def _sample_rows(corpus: Source) -> _Sample:
    """Read every row, count all, and keep a few."""
    sample = _Sample()
    chosen: _Reservoir[SampleRow] = _Reservoir(_SAMPLE)
    hashes: set[int] = set()
    for rows in _timed(corpus.blocks(), sample):
        sample.items += len(rows.keys)
        sample.rejected += len(rows.problems)
        for row in _sound(rows):
            chosen.offer(row)
            if sample.compared < _COMPARED:
                hashes.add(int.from_bytes(hashlib.blake2b(row.text, digest_size=8).digest(), "little"))
                sample.compared += 1
    sample.read, sample.rows, sample.different = sample.items, chosen.kept, len(hashes)
    return sample


def _timed(steps: Iterator[T], sample: _Sample) -> Iterator[T]:
    """Yield steps, and add the time that each takes to the sample's."""
    while True:
        began = perf_counter()
        step = next(steps, None)
        sample.seconds += perf_counter() - began
        if step is None:
            return
        yield step


def _sample_files(corpus: Corpus) -> _Sample:
    """Count rows by their places in the files, and read a few runs of them."""
    sample = _Sample()
    chosen: _Reservoir[tuple[Extent, int]] = _Reservoir(_SAMPLE // _RUN)
    for extent, count in _timed(_runs(corpus), sample):
        sample.items += count
        chosen.offer((extent, count))
    for extent, count in chosen.kept:
        for rows in read_extent(extent, count, corpus.columns, corpus.item_bytes):
            sample.read += len(rows.keys)
            sample.rejected += len(rows.problems)
            sample.rows += _sound(rows)
    sample.compared, sample.different = len(sample.rows), len({row.text for row in sample.rows})
    random.Random(0).shuffle(sample.rows)  # noqa: S311  # nosec B311
    return sample


def _sound(rows: Rows) -> Iterator[SampleRow]:
    carried: Sequence[bytes | None] = rows.carried or [None] * len(rows.keys)
    titles = rows.titles or [b""] * len(rows.keys)
    for key, text, more, title in zip(rows.keys, rows.texts, carried, titles, strict=True):
        if text is not None:
            yield SampleRow(key, text, more, title)


def _runs(corpus: Corpus) -> Iterator[tuple[Extent, int]]:
    for file in corpus.files:
        for places in corpus.places(file):
            for start in range(0, len(places.sizes), _RUN):
                end = min(start + _RUN, len(places.sizes))
                yield places.extent(file, start, places, end - 1), end - start
