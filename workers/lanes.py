"""What waits for a device: texts of many requests, in one lane for each encoder, and whose turn is next. No I/O."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.jobs import Model
from workers.batching import Tokenised, next_batch

if TYPE_CHECKING:
    from asyncio import Future

    from pipeline.wire import Embedded
    from workers.encoder import Encoder

_MOST_ITEMS = 2_048


@dataclass(eq=False, slots=True)
class Request:
    """Texts that are answered together."""

    model: Model
    done: "Future[Embedded]"
    tokenised: Tokenised
    vectors: npt.NDArray[np.float32]
    left: int
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One of a request's texts."""

    arrival: int
    request: Request
    at: int

    @property
    def tokens(self) -> int:
        """How many the model reads of it."""
        return int(self.request.tokenised.lengths[self.at])


@dataclass(eq=False, slots=True)
class _Lane:
    """What waits for one encoder."""

    encoder: "Encoder"
    texts: list[Text] = field(default_factory=list)

    def forget_dropped(self) -> None:
        self.texts = [text for text in self.texts if not text.request.dropped]

    def first(self) -> int:
        return min(text.arrival for text in self.texts)

    def shortest(self) -> int:
        return min(text.tokens for text in self.texts)

    def take(self, *, oldest: bool) -> list[Text]:
        at = next_batch(
            np.fromiter((text.tokens for text in self.texts), np.int32, len(self.texts)),
            np.fromiter((text.arrival for text in self.texts), np.int64, len(self.texts)),
            self.encoder.budget_tokens,
            _MOST_ITEMS,
            oldest=oldest,
        )
        taken = set(at.tolist())
        batch = [self.texts[n] for n in at.tolist()]
        self.texts = [text for n, text in enumerate(self.texts) if n not in taken]
        return batch


class Lanes:
    """Turns at the device. They alternate between the text that came first and the shortest one, of all lanes: none
    waits for ever, and a short one for no more than one batch of longer ones after that which is under way.

    A lane belongs to an encoder, not to a model's name: ids mean nothing to another one that took its place.
    """

    def __init__(self) -> None:
        self._lanes: dict[Encoder, _Lane] = {}
        self._arrivals = itertools.count()
        #: Whether the next batch is that of the oldest text; else that of the shortest.
        self._oldest = True

    def add(self, encoder: "Encoder", request: Request, texts: int) -> None:
        """Let a request's texts wait for an encoder that has read them."""
        lane = self._lanes.setdefault(encoder, _Lane(encoder))
        lane.texts += [Text(next(self._arrivals), request, at) for at in range(texts)]

    def take(self) -> "tuple[Encoder, Sequence[Text]] | None":
        """The texts of the next batch and their encoder. None: nobody waits."""
        for lane in list(self._lanes.values()):
            lane.forget_dropped()
            if not lane.texts:
                del self._lanes[lane.encoder]
        if not self._lanes:
            return None
        lane = min(self._lanes.values(), key=_Lane.first if self._oldest else _Lane.shortest)
        batch = lane.take(oldest=self._oldest)
        self._oldest = not self._oldest
        return lane.encoder, batch
