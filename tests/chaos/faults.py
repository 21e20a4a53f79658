"""What a fault is, and when what it struck is back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.chaos.site import BRITTLE, Site

#: Chunks `c`, with their jobs `j`, that a fault to all concerns. The brittle model's worker goes around what is struck.
ALL = f"j.model_name <> '{BRITTLE}'"
_CHUNKS = "vectormill.chunks c join vectormill.jobs j on j.id = c.job_id"
#: When each was claimed under the fence that it has.
_CLAIMS = "join witness.claims w on w.chunk_id = c.id and w.fence = c.fence"


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
#: Since when all is as before, by the monotonic clock; `None`: it isn't yet.
Back = Callable[[], float | None]


@dataclass
class Recovered:
    """The struck claim's chunk runs again; or, after a fault to all, a chunk that it concerns was claimed since
    `moment` of the database's clock, and has ended."""

    site: Site
    done: Done
    moment: Any
    of: str

    def __call__(self) -> float | None:
        """Ask again and again."""
        return time.monotonic() if self._is_back() else None

    def _is_back(self) -> bool:
        if self.done.claim:
            return is_back(self.site, self.done.claim)
        condition = f"w.at > :moment and c.state = 'done' and {self.of}"
        return bool(self.site.scalar(_exists(condition, f"{_CHUNKS} {_CLAIMS}"), moment=self.moment))


@dataclass
class FullSpeed:
    """Every slot runs a chunk that was claimed since `moment`: a message came through to each. It is back since all
    were at work without a pause worth the name."""

    site: Site
    done: Done
    moment: Any
    of: str
    _since: float = 0.0
    _seen: float = 0.0
    #: Between a chunk's end and the next claim a slot is idle for less than that.
    _pause_seconds = 1.0
    _steady_seconds = 3.0

    def __call__(self) -> float | None:
        """Ask again and again."""
        query = f"""
            select count(*) as busy, count(*) filter (where w.at > :moment) as anew
            from vectormill.chunks c {_CLAIMS} where c.state = 'running'
        """
        row, now = self.site.rows(query, moment=self.moment)[0], time.monotonic()
        if row["busy"] >= self.site.slots:
            if now - self._seen > self._pause_seconds:
                self._since = now
            self._seen = now
        steady = now - self._since >= self._steady_seconds
        return self._since if steady and row["anew"] >= self.site.slots else None


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    do: Do
    #: How often it comes, beside others.
    weight: int = 1
    #: Which chunks it concerns, in SQL: one of them runs when it begins.
    of: str = ALL
    #: Reasons for which jobs may pause by it.
    pauses: tuple[str, ...] = ()
    #: Leases may run out by it.
    expires: bool = False
    possible: Callable[[Site], bool] = lambda _: True
    #: What tells when all is as before, given the database's time when the fault was over.
    back: Callable[[Site, Done, Any, str], Back] = Recovered
    #: Within which it must be.
    most_seconds: float = 120.0


def concerns(site: Site, of: str) -> bool:
    """Whether one of these chunks runs."""
    return bool(site.scalar(_exists(f"c.state = 'running' and {of}")))


def _exists(condition: str, chunks: str = _CHUNKS) -> str:
    return f"select exists (select from {chunks} where {condition})"


def is_back(site: Site, claim: Claimed) -> bool:
    """Whether a chunk has been claimed again, or has ended; a job that is purged has."""
    query = "select fence > :fence or state in ('done', 'cancelled') from vectormill.chunks where id = :chunk"
    return site.scalar(query, chunk=claim.chunk, fence=claim.fence) is not False
