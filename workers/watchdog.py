"""The watchdog of a chunk: what its batches and the thread that renews its lease tell each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from pipeline.core.errors import GatewayBusy, GatewayRefused


@dataclass(slots=True)
class Watch:
    """What the renewal thread and the batches tell each other while a chunk runs."""

    #: A batch that takes longer has hung.
    hung_after_seconds: float
    #: The chunk is given back when it has taken so long.
    most_seconds: float
    #: What has been made is committed so often; at the end of each slice it always is.
    commit_seconds: float = inf
    began: float = field(default_factory=monotonic)
    #: Infinite while no batch is under way.
    last_batch: float = inf
    #: The job is being cancelled.
    cancelled: bool = False
    #: A renewal found the chunk to be another claim's.
    lost: bool = False
    #: Why nothing more comes of the chunk for now: its gateway lets nothing through.
    interruption: GatewayBusy | GatewayRefused | None = None

    def beat(self) -> None:
        """A batch begins: the first one, or the one after that which has just ended."""
        self.last_batch = monotonic()

    def rest(self) -> None:
        """No batch is under way. Waiting for a database that is away is no hang."""
        self.last_batch = inf

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Rest within, and then go on as before."""
        at_work = self.last_batch < inf
        self.rest()
        yield
        if at_work:
            self.beat()

    @property
    def hung(self) -> bool:
        """Whether a batch has been under way for too long."""
        return monotonic() - self.last_batch > self.hung_after_seconds

    @property
    def must_stop(self) -> bool:
        """Whether to commit what there is and let go of the rest."""
        return (
            self.cancelled or self.lost or self.interruption is not None or monotonic() - self.began > self.most_seconds
        )
