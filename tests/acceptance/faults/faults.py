"""What a fault is, and when what it struck is back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.acceptance.faults.site import Site


@dataclass(frozen=True)
class Claimed:
    """A chunk under a claim."""

    chunk: int
    fence: int


@dataclass(frozen=True)
class Done:
    """What a fault has done."""

    #: From when on recovery is counted, by the monotonic clock.
    since: float
    #: The claim that was struck; `None`: the whole installation was.
    claim: Claimed | None = None
    #: What is wrong already.
    said: tuple[str, ...] = ()


Do = Callable[[Site, Random], Done]


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    do: Do
    #: How often it comes, beside others.
    weight: int = 1
    #: Reasons for which jobs may pause by it.
    pauses: tuple[str, ...] = ()
    possible: Callable[[Site], bool] = lambda _: True
    #: Whether all is as before, given the database's time when the fault was over. Default: `recovered`.
    back: "Callable[[Site, Done, Any], bool] | None" = None
    #: Within which it must be.
    most_seconds: float = 120.0


def is_back(site: Site, claim: Claimed) -> bool:
    """Whether a chunk has been claimed again, or has ended; a job that is purged has."""
    query = "select fence > :fence or state in ('done', 'cancelled') from vectormill.chunks where id = :chunk"
    return site.scalar(query, chunk=claim.chunk, fence=claim.fence) is not False


def recovered(site: Site, done: Done, moment: Any) -> bool:
    """Whether the struck claim's chunk runs again; or, after a fault to all, a chunk was claimed since `moment` of the
    database's clock, and has ended."""
    if done.claim:
        return is_back(site, done.claim)
    query = "select exists (select from vectormill.chunks where started_at > :moment and state = 'done')"
    return bool(site.scalar(query, moment=moment))


class FullSpeed:
    """Every slot is at work, and has been for a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def __call__(self, site: Site, _: Done, __: Any) -> bool:
        """Ask again and again; once it is true, the next fault may come."""
        busy = site.scalar("select count(*) from vectormill.chunks where state = 'running'") == site.slots
        self._since = (self._since or time.monotonic()) if busy else None
        back = self._since is not None and time.monotonic() - self._since >= self._seconds
        if back:
            self._since = None
        return back
