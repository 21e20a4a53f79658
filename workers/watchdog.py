"""Watchdog of a chunk: the state shared by its batches and the thread that renews its lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from pipeline.core.errors import GatewayBusy, GatewayRefused


@dataclass(slots=True)
class Watch:
    """State that the lease renewal thread and the batches share while a chunk runs."""

    #: Time limit of a batch; one that takes longer has hung.
    hung_after_seconds: float
    #: Time limit of the claim from its first block on; past it, the rest of the chunk is given back.
    most_seconds: float
    #: Interval between commits within a slice. The end of a slice always commits.
    commit_seconds: float = inf
    began: float = field(default_factory=monotonic)
    #: Start of the current batch; infinite while none is running.
    last_batch: float = inf
    #: The job is being cancelled.
    cancelled: bool = False
    #: A renewal found that the chunk is no longer this claim's.
    lost: bool = False
    #: Error that ends the claim early: the upstream is busy or refuses.
    interruption: GatewayBusy | GatewayRefused | None = None

    def beat(self) -> None:
        """Restart the batch clock: a batch begins, the first one or the one after a batch that has just ended."""
        self.last_batch = monotonic()

    def rest(self) -> None:
        """Stop the batch clock. Waiting for a database that is away is not a hang."""
        self.last_batch = inf

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Stop the batch clock within the block, and restart it afterwards if it was running."""
        at_work = self.last_batch < inf
        self.rest()
        yield
        if at_work:
            self.beat()

    @property
    def hung(self) -> bool:
        """True if a batch has run past its limit."""
        return monotonic() - self.last_batch > self.hung_after_seconds

    @property
    def must_stop(self) -> bool:
        """True if the claim must commit what is done and give up the rest."""
        return (
            self.cancelled or self.lost or self.interruption is not None or monotonic() - self.began > self.most_seconds
        )
