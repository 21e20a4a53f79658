"""Model of a fault, and of the recovery from it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.chaos.site import BRITTLE, Site

#: SQL condition on chunks `c` and their jobs `j` that a fault of the whole installation concerns. The brittle model's
#: worker bypasses the places that are struck.
ALL = f"j.model_name <> '{BRITTLE}'"
_CHUNKS = "vectormill.chunks c join vectormill.jobs j on j.id = c.job_id"
#: Join with the time at which each chunk was claimed under its current fence.
_CLAIMS = "join witness.claims w on w.chunk_id = c.id and w.fence = c.fence"


@dataclass(frozen=True)
class Claimed:
    """Chunk under a claim."""

    chunk: int
    fence: int


@dataclass(frozen=True)
class Done:
    """Effect of a fault."""

    #: Start of the recovery, by the monotonic clock.
    since: float
    #: Claim that was struck; `None` if it was the whole installation.
    claim: Claimed | None = None
    #: Objections so far.
    said: tuple[str, ...] = ()


Do = Callable[[Site, Random], Done]
#: Time of recovery, by the monotonic clock; `None` before it.
Back = Callable[[], float | None]


@dataclass
class Recovered:
    """Recovery once the struck claim's chunk runs again. After a fault of the whole installation: once a chunk that it
    concerns was claimed after `moment`, by the database's clock, and has ended."""

    site: Site
    done: Done
    moment: Any
    of: str

    def __call__(self) -> float | None:
        """Return the time of recovery, or `None` before it."""
        return time.monotonic() if self._is_back() else None

    def _is_back(self) -> bool:
        if self.done.claim:
            return is_back(self.site, self.done.claim)
        condition = f"w.at > :moment and c.state = 'done' and {self.of}"
        return bool(self.site.scalar(_exists(condition, f"{_CHUNKS} {_CLAIMS}"), moment=self.moment))


@dataclass
class FullSpeed:
    """Recovery once every slot runs a chunk claimed after `moment`, so that a message has come through to each. It
    dates from when all slots were busy without a noticeable pause."""

    site: Site
    done: Done
    moment: Any
    of: str
    _since: float = 0.0
    _seen: float = 0.0
    #: Bound on a slot's idle time between a chunk's end and the next claim.
    _pause_seconds = 1.0
    _steady_seconds = 3.0

    def __call__(self) -> float | None:
        """Return the time of recovery, or `None` before it."""
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
    """Kind of fault."""

    name: str
    do: Do
    #: Frequency, relative to other kinds.
    weight: int = 1
    #: Chunks that it concerns, as an SQL condition: one of them runs when the fault begins.
    of: str = ALL
    #: Reasons for which it may pause jobs.
    pauses: tuple[str, ...] = ()
    #: True if it may let leases run out.
    expires: bool = False
    possible: Callable[[Site], bool] = lambda _: True
    #: Makes the test of recovery, given the database's time when the fault was over.
    back: Callable[[Site, Done, Any, str], Back] = Recovered
    #: Limit of the recovery time.
    most_seconds: float = 120.0


def concerns(site: Site, of: str) -> bool:
    """Return True if one of these chunks runs."""
    return bool(site.scalar(_exists(f"c.state = 'running' and {of}")))


def _exists(condition: str, chunks: str = _CHUNKS) -> str:
    return f"select exists (select from {chunks} where {condition})"


def is_back(site: Site, claim: Claimed) -> bool:
    """Return True if a chunk has been claimed again or has ended. Chunks of a purged job have ended."""
    query = "select fence > :fence or state in ('done', 'cancelled') from vectormill.chunks where id = :chunk"
    return site.scalar(query, chunk=claim.chunk, fence=claim.fence) is not False
