"""Fair queue of a device: texts of many requests, in one queue per encoder. No I/O."""

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
    from workers.encoders.local import LocalEncoder

_MOST_ITEMS = 2_048
#: Shares of a turn; a request takes one at a time.
_SHARES = 16
#: Batches per turn on a CPU; elsewhere one. On a CPU, handling requests and answers takes time from embedding, and a
#: client with a single text asks once in two turns. In turns of one batch, such clients cost long requests 7 % of the
#: rate that these get alone.
_TURN_BATCHES = 2


@dataclass(eq=False, slots=True)
class Work:
    """Remaining work of a request on the device."""

    #: Caller that it is done for; callers have equal shares.
    caller: str
    model: str
    #: Tokens that are left; an estimate until the texts are tokenised.
    tokens: float
    #: Time to tokenise the texts; 0 afterwards.
    reading_seconds: float


@dataclass(eq=False, slots=True)
class QueuedRequest:
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
    """One text of a request."""

    request: QueuedRequest
    at: int

    @property
    def tokens(self) -> int:
        """Number of its tokens, after truncation."""
        return int(self.request.tokenised.lengths[self.at])


@dataclass(eq=False, slots=True)
class _Waiting:
    """Request with texts that wait."""

    request: QueuedRequest
    #: Place in line, from when it came or last gave texts to a turn; lower places came earlier.
    place: int
    #: Virtual time: the queue's clock when it came, advanced by the cost of the texts it gave since.
    clock: float
    #: (tokens, position) of each text, sorted.
    texts: list[tuple[int, int]]

    def due(self, requests: int) -> float:
        """Return the virtual time at which its longest text is due, for a caller with this many requests."""
        return self.clock + self._cost(self.texts[-1][0], requests)

    def take(self, longest: int, requests: int) -> Text:
        """Remove and return its longest text of up to `longest` tokens; the shortest one if all are longer."""
        tokens, at = self.texts.pop(self._fitting(longest))
        self.clock += self._cost(tokens, requests)
        return Text(self.request, at)

    def would_take(self, longest: int) -> int:
        """Return the tokens of the text that `take` would return."""
        return self.texts[self._fitting(longest)][0]

    def _fitting(self, longest: int) -> int:
        return max(0, bisect_right(self.texts, (longest, inf)) - 1)

    @staticmethod
    def _cost(tokens: int, requests: int) -> float:
        # A caller's share is divided among its requests.
        return max(1, tokens) * requests


@dataclass(eq=False, slots=True)
class _EncoderQueue:
    """Requests that wait for one encoder."""

    encoder: "LocalEncoder"
    waiting: list[_Waiting] = field(default_factory=list)
    #: Virtual time: of the waiting request that had least, for its share.
    clock: float = 0.0
    places: Iterator[int] = field(default_factory=itertools.count)
    #: True: the next turn begins with the text due first. False: with the request that has waited longest.
    by_due: bool = True

    def add(self, request: QueuedRequest) -> None:
        texts = sorted(zip(request.tokenised.lengths.tolist(), range(len(request.tokenised.ids)), strict=True))
        self.waiting.append(_Waiting(request, next(self.places), self.clock, texts))

    def forget_dropped(self) -> None:
        self.waiting = [each for each in self.waiting if each.texts and not each.request.dropped]

    def take(self) -> list[Text]:
        """Return the texts of a turn. Each request adds texts that are about as long as the first one."""
        requests = Counter(each.request.work.caller for each in self.waiting)
        line = [(each.due(requests[each.request.work.caller]), each.place, each) for each in self.waiting]
        self.clock = min(each.clock for each in self.waiting)
        if not self.by_due:
            first = min(self.waiting, key=lambda each: each.place)
            line = [(-inf if each is first else due, place, each) for due, place, each in line]
        self.by_due = not self.by_due
        return self._fill(line, requests)

    def _fill(self, line: list[tuple[float, int, _Waiting]], requests: Counter[str]) -> list[Text]:
        """Return a turn filled from the line, in order of due time."""
        heapify(line)
        batches = _TURN_BATCHES if self.encoder.device.type == "cpu" else 1
        longest, room = line[0][2].texts[-1][0], batches * self.encoder.budget_tokens
        share = max(1, room // _SHARES)
        turn: list[Text] = []
        while line:
            _, _, each = heappop(line)
            of_caller, given = requests[each.request.work.caller], 0
            while each.texts:
                tokens = max(1, each.would_take(min(longest, room)))
                if turn and (tokens > room or len(turn) == _MOST_ITEMS):
                    break
                if given and given + tokens > share:
                    heappush(line, (each.due(of_caller), next(self.places), each))
                    break
                turn.append(each.take(min(longest, room), of_caller))
                given, room = given + tokens, room - tokens
            if given:
                each.place = next(self.places)
        return turn


class DeviceQueue:
    """Queues of a device, one per encoder: they take turns, each with fair queueing (Goyal, Vin and Cheng 1996).

    A text is due when it would be done if all callers had equal shares of the device, and all requests of a caller
    equal shares of that. A request that arrives is even with the one that had least for its share, so that its short
    text is due before longer ones. Every other turn begins with the request that has waited longest, so that none is
    starved by shorter texts.

    A queue belongs to an encoder, not to a model's name: token ids mean nothing to an encoder that replaces it.
    """

    def __init__(self) -> None:
        #: Queues by encoder, the one whose turn is next first.
        self._queues: dict[LocalEncoder, _EncoderQueue] = {}

    def add(self, encoder: "LocalEncoder", request: QueuedRequest) -> None:
        """Queue a request's texts for the encoder that has tokenised them."""
        self._queues.setdefault(encoder, _EncoderQueue(encoder)).add(request)

    def take(self) -> "tuple[LocalEncoder, Sequence[Text]] | None":
        """Return the encoder and the texts of the next turn, or None if nothing waits."""
        for encoder, queue in list(self._queues.items()):
            del self._queues[encoder]
            queue.forget_dropped()
            if queue.waiting:
                self._queues[encoder] = queue
                return encoder, queue.take()
        return None


def seconds_ahead(waiting: Iterable[tuple[str, float]], caller: str, seconds: float) -> float:
    """Return the seconds that a request waits for others, if callers have equal shares, and so have their requests.

    Args:
        waiting: caller and remaining seconds of work of each request that waits or is in progress.
        caller: the request's caller.
        seconds: the request's own work.
    """
    of_others: defaultdict[str, float] = defaultdict(float)
    own = seconds
    for other, left in waiting:
        if other == caller:
            own += min(left, seconds)
        else:
            of_others[other] += left
    return own - seconds + sum(min(left, own) for left in of_others.values())
