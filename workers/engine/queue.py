"""The queue of a device: texts of many requests, in one lane for each encoder, and whose turn is next. No I/O."""

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.core.models import Model
from workers.encoders.batching import Tokenised

if TYPE_CHECKING:
    from asyncio import Future

    from pipeline.core.openai import Embedded
    from workers.encoders.local import Encoder

_MOST_ITEMS = 2_048
#: Shares of a turn that a request takes at a time.
_SHARES = 16
#: Batches of a model's size in a turn on a CPU, elsewhere one. There requests and answers are paid by what it embeds; a
#: client of one text asks once in two turns. Turns of one batch cost 7 % of what long requests get alone.
_TURN_BATCHES = 2


@dataclass(eq=False, slots=True)
class Work:
    """The rest of what a request asks of the device."""

    #: On whose behalf: callers have equal shares.
    caller: str
    model: str
    #: Estimated until its texts have been read.
    tokens: float
    #: Until then.
    reading_seconds: float


@dataclass(eq=False, slots=True)
class Request:
    """Texts that are answered together."""

    model: Model
    done: "Future[Embedded]"
    tokenised: Tokenised
    vectors: npt.NDArray[np.float32]
    left: int
    work: Work
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One of a request's texts."""

    request: Request
    at: int

    @property
    def tokens(self) -> int:
        """How many the model reads of it."""
        return int(self.request.tokenised.lengths[self.at])


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request with texts that wait."""

    request: Request
    #: Its place in the line: it came, or was last given something, before those with greater ones.
    place: int
    #: The lane's clock when it came, moved on by what it was given since.
    clock: float
    #: (tokens, position) of each text, in this order.
    texts: list[tuple[int, int]]

    def due(self, requests: int) -> float:
        """When its longest text should be done at the latest, of a caller with so many requests."""
        return self.clock + self._cost(self.texts[-1][0], requests)

    def take(self, longest: int, requests: int) -> Text:
        """Give its longest text of up to `longest` tokens; the shortest one if all are longer."""
        tokens, at = self.texts.pop(self._fitting(longest))
        self.clock += self._cost(tokens, requests)
        return Text(self.request, at)

    def would_take(self, longest: int) -> int:
        """The tokens of the text that `take` would give."""
        return self.texts[self._fitting(longest)][0]

    def _fitting(self, longest: int) -> int:
        return max(0, bisect_right(self.texts, (longest, inf)) - 1)

    @staticmethod
    def _cost(tokens: int, requests: int) -> float:
        # A caller's share is divided by its requests.
        return max(1, tokens) * requests


@dataclass(eq=False, slots=True)
class _Lane:
    """What waits for one encoder."""

    encoder: "Encoder"
    waiting: list[_Waiting] = field(default_factory=list)
    #: Nothing that waits was due before.
    clock: float = 0.0
    places: Iterator[int] = field(default_factory=itertools.count)
    #: Whether the next turn begins with what is due first; else with who has waited longest.
    by_due: bool = True

    def add(self, request: Request) -> None:
        texts = sorted(zip(request.tokenised.lengths.tolist(), range(len(request.tokenised.ids)), strict=True))
        self.waiting.append(_Waiting(request, next(self.places), self.clock, texts))

    def forget_dropped(self) -> None:
        self.waiting = [each for each in self.waiting if each.texts and not each.request.dropped]

    def take(self) -> list[Text]:
        """The texts of a turn. Of each request those texts go along that are about as long as the first one."""
        requests = Counter(each.request.work.caller for each in self.waiting)
        line = [(each.due(requests[each.request.work.caller]), each.place, each) for each in self.waiting]
        self.clock = min(line)[0]
        if not self.by_due:
            first = min(self.waiting, key=lambda each: each.place)
            line = [(-inf if each is first else due, place, each) for due, place, each in line]
        self.by_due = not self.by_due
        return self._fill(line, requests)

    def _fill(self, line: list[tuple[float, int, _Waiting]], requests: Counter[str]) -> list[Text]:
        """A turn of what stands in line: first come those with the least numbers."""
        heapify(line)
        batches = _TURN_BATCHES if self.encoder.device.type == "cpu" else 1
        longest, room = line[0][2].texts[-1][0], batches * self.encoder.budget_tokens
        share = max(1, room // _SHARES)
        turn: list[Text] = []
        while line:
            _, _, each = heappop(line)
            of_caller, given = requests[each.request.work.caller], 0
            while each.texts and given < share:
                tokens = max(1, each.would_take(min(longest, room)))
                if turn and (tokens > room or len(turn) == _MOST_ITEMS):
                    break
                turn.append(each.take(min(longest, room), of_caller))
                given, room = given + tokens, room - tokens
            if given:
                each.place = next(self.places)
            if each.texts and given >= share:
                heappush(line, (each.due(of_caller), each.place, each))
        return turn


class Lanes:
    """Turns at the device: the lanes take turns, and within one there is fair queueing (Golestani 1994, self-clocked).

    A text is due when its request would have it done if all callers had equal shares of the device, and all requests
    of a caller equal shares of that. So a short text that comes is due before longer ones. Every other turn begins
    with the request that has waited longest, so that none waits for ever for texts that are shorter.

    A lane belongs to an encoder, not to a model's name: ids mean nothing to another one that took its place.
    """

    def __init__(self) -> None:
        #: The one whose turn is next comes first.
        self._lanes: dict[Encoder, _Lane] = {}

    def add(self, encoder: "Encoder", request: Request) -> None:
        """Let a request's texts wait for an encoder that has read them."""
        self._lanes.setdefault(encoder, _Lane(encoder)).add(request)

    def take(self) -> "tuple[Encoder, Sequence[Text]] | None":
        """The texts of the next turn and their encoder. None: nobody waits."""
        for encoder, lane in list(self._lanes.items()):
            del self._lanes[encoder]
            lane.forget_dropped()
            if lane.waiting:
                self._lanes[encoder] = lane
                return encoder, lane.take()
        return None


def seconds_ahead(waiting: Iterable[tuple[str, float]], caller: str, seconds: float) -> float:
    """Return how long a request of so many seconds waits for others, when callers and their requests have equal shares.

    Args:
        waiting: the callers of requests that wait or are under way, and the seconds of work that are left of each.
        caller: whose request it is.
        seconds: of work.
    """
    of_others: defaultdict[str, float] = defaultdict(float)
    own = seconds
    for other, left in waiting:
        if other == caller:
            own += min(left, seconds)
        else:
            of_others[other] += left
    return own - seconds + sum(min(left, own) for left in of_others.values())
