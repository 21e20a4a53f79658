"""Batching of the items that go through an encoder together. Pure: lengths in, positions out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import RejectCode
from pipeline.core.options import KeptOptions, SplitBy

#: Items in one isolated slice at level 1; each level narrows eightfold, to single items.
_WIDEST_SLICE = 64
_NARROWING = 8
#: Level at which a slice is a single item; at the next level that item gets its second chance.
_SINGLE = 3
#: From this level on the head item has killed its process twice when alone.
CONVICTED = _SINGLE + 2
#: Characters that are read for each token that counts; the rest of a longer text isn't read where these are enough.
MOST_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Texts as the model reads them."""

    #: Token ids of each text, as int32; for an upstream's model, which tokenises for itself, the texts.
    ids: Sequence[Any]
    #: Tokens of each text after truncation, special tokens included.
    lengths: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    #: Tokens that truncation left out of each text, of a very long one about so many; `None`: not known.
    lost: npt.NDArray[np.int64] | None = None

    def select(self, mask: npt.NDArray[np.bool_]) -> "Tokenised":
        """Return the texts where `mask` is true."""
        ids = [ids for ids, keep in zip(self.ids, mask, strict=True) if keep]
        lost = None if self.lost is None else self.lost[mask]
        return Tokenised(ids, self.lengths[mask], self.truncated[mask], lost)


#: Passages that are tokenised at once: while it works, a tokeniser takes a hundred bytes for each token.
TOKENISED_AT_ONCE = 4_096
#: Least tokens of a passage beside its prompt, its title and special tokens.
LEAST_TOKENS = 8
#: Passage of a text: `text[start:stop]`.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Rule by which texts become passages."""

    #: Most tokens of a passage as the model reads it, with its prompt, the title and special tokens.
    tokens: int
    #: Most tokens that a passage repeats of the one before.
    overlap: int = 0
    by: SplitBy = SplitBy.PARAGRAPH


def split_rule(options: KeptOptions, max_item_tokens: int | None) -> SplitRule:
    """Return the rule of a job that is split, of which the model reads `max_item_tokens` of a text."""
    tokens = min(bound for bound in (options.split, max_item_tokens) if bound)
    return SplitRule(tokens, options.overlap, options.split_by)


def entitled(title: str, passage: str) -> str:
    """Return a passage as the model reads it, with the title before it."""
    return f"{title}\n\n{passage}" if title else passage


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass, or one request to an upstream."""

    #: Positions of its texts.
    at: npt.NDArray[np.int64]
    #: Tokens of each of its texts.
    tokens: npt.NDArray[np.int32]
    seconds: float
    #: float32 of shape (texts, dimensions); `None` when its single text failed.
    vectors: npt.NDArray[np.float32] | None = None
    #: Code and message of its reject, if it failed.
    failure: tuple[RejectCode, str] | None = None
    #: Positions of texts that an upstream says it has truncated.
    truncated: Sequence[int] = ()
    #: Tokens with padding; 0 if it isn't known, as with an upstream.
    padded_tokens: int = 0
    #: Time that it would take at the device's rate of matrix products; 0 if the model multiplies nothing, or elsewhere.
    roofline_seconds: float = 0.0


class Encoder(Protocol):
    """Encoder of texts into vectors: a model on this device, or an upstream."""

    dimensions: int

    @property
    def device_kind(self) -> str | None:
        """Kind of its device; None for an upstream."""

    @property
    def precision(self) -> str | None:
        """Precision in which it computes; None for an upstream."""

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokenised:
        """Tokenise texts, truncated at `max_tokens`."""

    def split(
        self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule, beat: Callable[[], None] = ...
    ) -> list[list[Span]]:
        """Return the passages of each text, none with more than `rule.tokens`. A text whose title leaves no room for
        passages has none. `beat` is called again and again meanwhile."""

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = ...) -> Iterator[Batch]:
        """Embed all texts in batches. No further one is begun once `stop` returns True."""

    def prove_again(self) -> None:
        """Check the canary, to tell a bad text from a bad model. Raises `ModelError`, or an upstream's errors."""


def token_batches(
    lengths: npt.NDArray[np.int32], budget_tokens: int, most_items: int, *, pads: bool = True
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the item positions of each forward pass, longest items first, so that running out of memory shows at once.

    A batch's size stays within `budget_tokens`: its longest length × its items if the model pads, else the sum of its
    lengths. A single item may exceed it.
    """
    order = np.argsort(-lengths, kind="stable")
    in_order = np.maximum(lengths[order], 1)
    ends = np.cumsum(in_order, dtype=np.int64)
    start = 0
    while start < len(order):
        if pads:
            fitting = budget_tokens // int(in_order[start])
        else:
            before = int(ends[start - 1]) if start else 0
            fitting = int(np.searchsorted(ends, before + budget_tokens, side="right")) - start
        size = min(most_items, max(1, fitting))
        yield order[start : start + size]
        start += size


def passes(lengths: npt.NDArray[np.int32], spare_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield a batch's item positions by forward pass, longest first. A pass ends where padding shorter items would cost
    more than `spare_tokens`."""
    order = np.argsort(-lengths, kind="stable")
    start = spare = 0
    for at, length in enumerate(lengths[order].tolist()):
        spare += int(lengths[order[start]]) - length
        if spare > spare_tokens:
            yield order[start:at]
            start, spare = at, 0
    if start < len(order):
        yield order[start:]


def share_out(total: int, weights: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return whole numbers in proportion to `weights` (all above 0) that add up to `total`."""
    running = np.cumsum(weights, dtype=np.float64)
    return np.diff(np.rint(running * (total / running[-1])), prepend=0).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive items that are embedded and committed together."""

    start: int
    stop: int
    #: Isolation level at which a crash during this slice counts.
    level: int


def isolated_slices(items: int, level: int) -> Iterator[Slice]:
    """Yield the slices of a chunk whose worker died: in fixed order, each one committed before the next.

    At level k the items that were in progress when the last claim was lost are the first eight slices of level k (at
    most 64 items at level 1, 8 at level 2, 1 from level 3 on). Past them the search starts over at level 1. At level
    `CONVICTED` the caller rejects the head item and goes on at level 1.
    """
    steps: list[int] = []
    if level == _SINGLE + 1:  # the head item alone once more, then the rest of its slice
        steps = [level]
        level = _SINGLE
    if level > 1:
        steps += [level] * _NARROWING
    start = 0
    while start < items:
        step = steps.pop(0) if steps else 1
        stop = min(items, start + max(1, _WIDEST_SLICE // _NARROWING ** (min(step, _SINGLE) - 1)))
        yield Slice(start, stop, step)
        start = stop
