"""Requests to a gateway on their way: which texts they hold, and what has become of them so far."""

import random
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import RejectCode
from workers.upstream.rate_limiter import Leave

#: Before a request goes out again; doubled with each failure.
_REST_SECONDS = 0.5
_MOST_REST_SECONDS = 8.0


@dataclass(eq=False, slots=True)
class Halves:
    """What a refused request was split into."""

    refused_inputs: int
    #: Of the larger half.
    inputs: int
    tokens: int
    passed: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """Texts that go out together."""

    #: Positions of the texts.
    at: npt.NDArray[np.int64]
    #: The canary's request has no texts of the chunk. What comes of it settles `judges`, which has failed.
    canary: bool = False
    judges: "Request | None" = None
    #: Those that it is one of.
    halves: Halves | None = None
    since: float = field(default_factory=time.monotonic)
    #: Since it was last judged: answers without vectors, and how long they took.
    failures: int = 0
    seconds: float = 0.0
    #: By limits.
    refusals: int = 0
    #: How often the canary came through when this had failed.
    judgements: int = 0
    #: Before which moment it isn't sent again, by the monotonic clock.
    rests_until: float = 0.0
    trouble: str = ""
    #: With which a text that keeps failing is rejected.
    code: RejectCode = RejectCode.GATEWAY_FAILED

    def rest(self, times: int) -> None:
        """Not again at once, after so many times."""
        seconds = min(_MOST_REST_SECONDS, _REST_SECONDS * 2**times)
        self.rests_until = time.monotonic() + seconds * random.uniform(0.5, 1.0)  # noqa: S311  # nosec B311

    def split(self, lengths: npt.NDArray[np.int32], *, refused: bool) -> "list[Request]":
        """Both halves. `lengths`: tokens of all texts; `refused`: maybe for its size."""
        half = (len(self.at) + 1) // 2
        ends = [self.at[:half], self.at[half:]]
        halves = Halves(len(self.at), half, max(int(lengths[at].sum()) for at in ends)) if refused else None
        return [Request(at, halves=halves) for at in ends]


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that is under way, or has its leave to go out at a moment."""

    request: Request
    leave: Leave
    moment: float = 0.0
    attempt: int = 0
    key: str | None = None


def canary_request(judges: Request | None = None) -> Request:
    """The canary's, to prove the gateway or to judge a request."""
    return Request(np.zeros(0, np.int64), canary=True, judges=judges)
