"""Batching: the items that go through an encoder together. Pure: lengths in, positions out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import RejectCode

#: Items in one isolated slice at level 1; each level narrows eightfold, to single items.
_WIDEST_SLICE = 64
_NARROWING = 8
#: The level at which a slice is a single item; one level further it gets its second chance.
_SINGLE = 3
#: From this level on the head item has killed its process twice when alone.
CONVICTED = _SINGLE + 2
#: Of a longer text only so many characters for each token that counts are read, where that is enough.
MOST_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Texts as the model reads them."""

    #: Token ids; of a gateway's model, which reads for itself, the texts.
    ids: Sequence[Any]
    #: Tokens of each text after truncation, special tokens included.
    lengths: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]

    def select(self, mask: npt.NDArray[np.bool_]) -> "Tokenised":
        """The texts where `mask` is true."""
        ids = [ids for ids, keep in zip(self.ids, mask, strict=True) if keep]
        return Tokenised(ids, self.lengths[mask], self.truncated[mask])


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass, or one request to a gateway."""

    #: Positions of its texts.
    at: npt.NDArray[np.int64]
    #: Of each of its texts.
    tokens: npt.NDArray[np.int32]
    seconds: float
    #: float32 of shape (texts, dimensions); `None` when its single text failed.
    vectors: npt.NDArray[np.float32] | None = None
    #: Why it did.
    failure: tuple[RejectCode, str] | None = None
    #: Positions of texts that a gateway says it has cut.
    truncated: Sequence[int] = ()
    #: Its tokens, and what shorter texts were filled up with; 0: a gateway doesn't tell.
    padded_tokens: int = 0


class Encoder(Protocol):
    """What turns texts into vectors: a model on this device, or a gateway."""

    dimensions: int

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokenised:
        """Read texts, cut at `max_tokens`."""

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = ...) -> Iterator[Batch]:
        """Embed all texts, in batches; no further one is begun once `stop` says so."""

    def prove_again(self) -> None:
        """Tell a bad text from a bad model. Raises `ModelError`."""


def token_batches(
    lengths: npt.NDArray[np.int32], budget_tokens: int, most_items: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of the items of each forward pass, longest items first, so that running out of memory shows at once.

    A batch's padded size, its longest length × its items, stays within `budget_tokens`; a single item may exceed it.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = min(most_items, max(1, budget_tokens // longest))
        yield order[start : start + size]
        start += size


def passes(lengths: npt.NDArray[np.int32], spare_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of a batch's items by forward pass, longest first: a pass ends where filling up what is shorter would
    cost more than `spare_tokens`."""
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
    """Whole numbers in proportion to `weights`, above 0 all of them, that add up to `total`."""
    running = np.cumsum(weights, dtype=np.float64)
    return np.diff(np.rint(running * (total / running[-1])), prepend=0).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive items that are embedded and committed as one."""

    start: int
    stop: int
    #: What a crash while this slice is under way would be counted at.
    level: int


def isolated_slices(items: int, level: int) -> Iterator[Slice]:
    """How a chunk whose worker died goes on: in fixed order, each slice committed before the next.

    At level k the items that were under way when the last claim was lost are the first eight slices of level k (at
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
