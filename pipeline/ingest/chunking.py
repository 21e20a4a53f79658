"""Chunking of a corpus, and batching of texts into requests to an upstream. Pure: lengths in, ranges out."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Bytes of UTF-8 per token, roughly, over European languages and code; sizes chunks, never counts usage.
_BYTES_PER_TOKEN = 4
#: Special tokens around a text.
_SPECIAL_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLimits:
    """Size limits of a chunk; a single item may exceed them."""

    tokens: int
    items: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Range:
    """Range of consecutive items that makes a chunk."""

    first_index: int
    items: int
    tokens: int


def chunk_tokens(chunk_seconds: float, tokens_per_second: float) -> int:
    """Return the number of tokens that one slot embeds in `chunk_seconds`."""
    return max(1, round(chunk_seconds * tokens_per_second))


def estimate_tokens(sizes: npt.NDArray[np.int64], max_item_tokens: int | None) -> npt.NDArray[np.int64]:
    """Estimate the tokens of texts from their sizes in bytes; a size of 0 stands for a reject and costs nothing."""
    estimate = sizes // _BYTES_PER_TOKEN + _SPECIAL_TOKENS
    if max_item_tokens is not None:
        estimate = np.minimum(estimate, max_item_tokens)
    return np.where(sizes == 0, 0, estimate)


def estimate_split_tokens(
    sizes: npt.NDArray[np.int64], titles: npt.NDArray[np.int64] | None, tokens: int, overlap: int
) -> npt.NDArray[np.int64]:
    """Estimate the tokens of all passages of texts from the sizes of texts and titles in bytes, given a passage's
    tokens and overlap. Without `titles`, the sizes count them too."""
    before = _SPECIAL_TOKENS + (0 if titles is None else np.minimum(titles // _BYTES_PER_TOKEN, tokens))
    estimate = sizes // _BYTES_PER_TOKEN
    passages = estimate // np.maximum(1, tokens - before - overlap) + 1
    return np.where(sizes == 0, 0, estimate + passages * before + (passages - 1) * overlap)


def request_batches(
    lengths: npt.NDArray[np.int32], most_tokens: float, most_items: float
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the positions of the texts of each request to an upstream, in order. A request has at most `most_items`
    texts and `most_tokens` tokens, unless one text alone has more."""
    start = tokens = 0
    for at, length in enumerate(lengths.tolist()):
        if at > start and (tokens + length > most_tokens or at - start == most_items):
            yield np.arange(start, at)
            start, tokens = at, 0
        tokens += length
    if start < len(lengths):
        yield np.arange(start, len(lengths))


#: Grains in a full chunk.
_GRAINS = 8
#: Grains that stay unassigned until the end of the corpus is known.
_HELD_BACK = 24


class _Load(NamedTuple):
    tokens: int
    bytes: int
    items: int

    def plus(self, other: "_Load") -> "_Load":
        return _Load(self.tokens + other.tokens, self.bytes + other.bytes, self.items + other.items)


class Planner:
    """Planner that cuts a stream of items into chunks.

    Items are cut greedily into grains of an eighth of a chunk, and grains are joined into chunks. The last grains make
    ever smaller chunks, so that the slots that work on a job finish at about the same time. No chunk crosses a
    `break_off`.
    """

    def __init__(self, limits: ChunkLimits) -> None:
        self._limits = _Load(limits.tokens, limits.bytes, limits.items)
        self._grain = _Load(*(max(1, limit // _GRAINS) for limit in self._limits))
        self._open = _Load(0, 0, 0)
        self._grains: deque[_Load] = deque()
        self._first = 0
        self._added = 0
        #: Indexes at which a chunk must begin, among the grains still held.
        self._breaks: deque[int] = deque()

    def add(self, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[Range]:
        """Add the next items, by estimated tokens and bytes; yield the chunks that are final by now."""
        self._added += len(tokens)
        for grain in self._cut(tokens, sizes):
            self._grains.append(grain)
            if len(self._grains) > _HELD_BACK:
                yield self._join(_GRAINS)

    def break_off(self) -> Iterator[Range]:
        """Begin a new chunk with the next item, which is in another file. Yield the chunks that are final by now."""
        self._close()
        self._breaks.append(self._added)
        while len(self._grains) > _HELD_BACK:
            yield self._join(_GRAINS)

    def _close(self) -> None:
        if self._open.items:
            self._grains.append(self._open)
            self._open = _Load(0, 0, 0)

    def finish(self) -> Iterator[Range]:
        """Yield the remaining chunks, each with a quarter of the grains left, at most a full chunk."""
        self._close()
        while self._grains:
            yield self._join(min(_GRAINS, len(self._grains) // 4))

    def _cut(self, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[_Load]:
        """Yield the grains that these items complete; each ends before the item that would exceed a limit."""
        sums = (np.cumsum(tokens), np.cumsum(sizes), np.arange(1, len(tokens) + 1))
        done = 0
        while done < len(tokens):
            before = [int(total[done - 1]) if done else 0 for total in sums]
            # The first position at which a sum, counted from `done`, would exceed the rest of its limit.
            cut = min(
                int(np.searchsorted(total, limit - held + start, side="right"))
                for total, limit, held, start in zip(sums, self._grain, self._open, before, strict=True)
            )
            if cut == done and not self._open.items:
                cut = done + 1  # an item over a limit is a grain of its own
            if cut > done:
                taken = (int(total[cut - 1]) - start for total, start in zip(sums, before, strict=True))
                self._open = self._open.plus(_Load(*taken))
                done = cut
            if done < len(tokens):
                yield self._open
                self._open = _Load(0, 0, 0)

    def _join(self, most: int) -> Range:
        """Join the next grains into a chunk: at least one, at most `most`, within the limits."""
        joined = self._grains.popleft()
        while self._breaks and self._breaks[0] <= self._first:
            self._breaks.popleft()
        end = self._breaks[0] if self._breaks else None
        for _ in range(most - 1):
            if self._first + joined.items == end:
                break
            larger = joined.plus(self._grains[0])
            if any(load > limit for load, limit in zip(larger, self._limits, strict=True)):
                break
            joined = larger
            self._grains.popleft()
        chunk = Range(self._first, joined.items, joined.tokens)
        self._first += joined.items
        return chunk
