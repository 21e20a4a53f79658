"""Where a corpus is cut into chunks. Pure: lengths in, ranges out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Bytes of UTF-8 per token, roughly, over European languages and code; sizes chunks, never counts usage.
_BYTES_PER_TOKEN = 4
#: Special tokens around a text.
_SPECIAL_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a chunk may hold at most; a single item may be more."""

    tokens: int
    items: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive items that make a chunk."""

    first_index: int
    items: int
    tokens: int


def chunk_tokens(chunk_seconds: float, tokens_per_second: float) -> int:
    """The tokens that one slot embeds in `chunk_seconds`."""
    return max(1, round(chunk_seconds * tokens_per_second))


def estimate_tokens(sizes: npt.NDArray[np.int64], max_item_tokens: int | None) -> npt.NDArray[np.int64]:
    """Tokens that texts of so many bytes will be read as; 0 bytes stand for a reject and cost nothing."""
    estimate = sizes // _BYTES_PER_TOKEN + _SPECIAL_TOKENS
    if max_item_tokens is not None:
        estimate = np.minimum(estimate, max_item_tokens)
    return np.where(sizes == 0, 0, estimate)


class Planner:
    """Cuts a stream of items greedily: a chunk ends before the item that would exceed a limit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._first = 0
        self._held = np.zeros(3, dtype=np.int64)  # tokens, bytes, items of the open chunk

    def add(self, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[Range]:
        """Take the next items, by estimated tokens and bytes; yield the chunks that this completes."""
        limits = (self._limits.tokens, self._limits.bytes, self._limits.items)
        sums = [np.cumsum(tokens), np.cumsum(sizes), np.arange(1, len(tokens) + 1)]
        done = 0
        while done < len(tokens):
            before = [int(total[done - 1]) if done else 0 for total in sums]
            # The first position at which each sum, counted from `done`, would exceed what its limit leaves.
            cut = min(
                int(np.searchsorted(total, limit - held + start, side="right"))
                for total, limit, held, start in zip(sums, limits, self._held, before, strict=True)
            )
            if cut == done and self._held[2] == 0:
                cut = done + 1  # an item over a limit is a chunk of its own
            if cut > done:
                self._held += [int(total[cut - 1]) - start for total, start in zip(sums, before, strict=True)]
                done = cut
            if done < len(tokens):
                yield self._close()

    def finish(self) -> Iterator[Range]:
        """Yield what is left."""
        if self._held[2]:
            yield self._close()

    def _close(self) -> Range:
        tokens, _, items = (int(held) for held in self._held)
        closed = Range(self._first, items, tokens)
        self._first += items
        self._held[:] = 0
        return closed
