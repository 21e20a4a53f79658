"""Requests to an upstream: their texts, and their state between retries."""

import random
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import RejectCode
from workers.upstream.rate_limiter import Leave

#: Backoff before a retry; doubled with each failure, up to the maximum.
_REST_SECONDS = 0.5
_MOST_REST_SECONDS = 8.0


@dataclass(eq=False, slots=True)
class Halves:
    """Halves of a refused request, from which the upstream's size limit is learnt."""

    refused_inputs: int
    #: Size of the larger half, in inputs and in tokens.
    inputs: int
    tokens: int
    passed: int = 0


@dataclass(eq=False, slots=True)
class UpstreamRequest:
    """Texts that are sent together."""

    #: Positions of the texts.
    at: npt.NDArray[np.int64]
    #: True for the canary's request, which has no texts of the chunk. Its outcome decides on `judges`, which failed.
    canary: bool = False
    judges: "UpstreamRequest | None" = None
    #: Both halves, if this is one of them.
    halves: Halves | None = None
    since: float = field(default_factory=time.monotonic)
    #: Number of failures since it was last judged, and the time that they took.
    failures: int = 0
    seconds: float = 0.0
    #: Refusals by rate limits.
    refusals: int = 0
    #: Number of times that the canary came through after this failed.
    judgements: int = 0
    #: Earliest time of the next attempt, by the monotonic clock.
    rests_until: float = 0.0
    trouble: str = ""
    #: Reject code of a text that keeps failing.
    code: RejectCode = RejectCode.GATEWAY_FAILED

    def rest(self, times: int) -> None:
        """Set the backoff after `times` failures or refusals, with jitter."""
        seconds = min(_MOST_REST_SECONDS, _REST_SECONDS * 2**times)
        self.rests_until = time.monotonic() + seconds * random.uniform(0.5, 1.0)  # noqa: S311  # nosec B311

    def split(self, lengths: npt.NDArray[np.int32], *, refused: bool) -> "list[UpstreamRequest]":
        """Return both halves. `lengths`: tokens of all texts; `refused`: True if its size may be the cause."""
        half = (len(self.at) + 1) // 2
        ends = [self.at[:half], self.at[half:]]
        halves = Halves(len(self.at), half, max(int(lengths[at].sum()) for at in ends)) if refused else None
        return [UpstreamRequest(at, halves=halves) for at in ends]


@dataclass(frozen=True, slots=True)
class Sent:
    """Request that is in flight, or has a leave to be sent at a moment."""

    request: UpstreamRequest
    leave: Leave
    moment: float = 0.0
    attempt: int = 0
    key: str | None = None


def canary_request(judges: UpstreamRequest | None = None) -> UpstreamRequest:
    """Return a canary request, to prove the upstream or to judge a failed request."""
    return UpstreamRequest(np.zeros(0, np.int64), canary=True, judges=judges)
