"""Watchdog of a chunk: the state shared by its threads, which embed, tokenise ahead, commit and renew the lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from threading import get_ident
from time import monotonic

from pipeline.core.errors import GatewayBusy, GatewayRefused


@dataclass(slots=True)
class Watch:
    """State that a chunk's threads share while it runs."""

    #: Time limit of a batch; one that takes longer has hung.
    hung_after_seconds: float
    #: Time limit of the claim from its first block on; past it, the rest of the chunk is given back.
    most_seconds: float
    #: Interval between commits within a slice. The end of a slice always commits.
    commit_seconds: float = inf
    began: float = field(default_factory=monotonic)
    #: Start of the current batch of each thread that runs one.
    batches: dict[int, float] = field(default_factory=dict)
    #: False if the time limit waits until an item is settled, so that one with very many passages is done in one claim.
    progressed: bool = True
    #: The job is being cancelled.
    cancelled: bool = False
    #: A renewal found that the chunk is no longer this claim's.
    lost: bool = False
    #: A commit failed.
    failed: bool = False
    #: Error that ends the claim early: the upstream is busy or refuses.
    interruption: GatewayBusy | GatewayRefused | None = None

    def beat(self) -> None:
        """Restart this thread's batch clock: a batch begins, the first one or the one after a batch that has ended."""
        self.batches[get_ident()] = monotonic()

    def rest(self) -> None:
        """Stop this thread's batch clock. Waiting for a database that is away is not a hang."""
        self.batches.pop(get_ident(), None)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Stop this thread's batch clock within the block, and restart it afterwards if it was running."""
        at_work = get_ident() in self.batches
        self.rest()
        yield
        if at_work:
            self.beat()

    def fail(self) -> None:
        """Note that a commit failed."""
        self.failed = True

    @property
    def hung(self) -> bool:
        """True if a batch has run past its limit."""
        began = min(list(self.batches.values()), default=inf)
        return monotonic() - began > self.hung_after_seconds

    @property
    def must_stop(self) -> bool:
        """True if the claim must commit what is done and give up the rest."""
        stopped = self.cancelled or self.lost or self.failed or self.interruption is not None
        return stopped or (self.progressed and monotonic() - self.began > self.most_seconds)
