"""State of a dispatcher: connections, settings, and how far its duties have come. Nothing here matters: one that starts
afresh only rings twice for a few chunks."""

import time
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from sqlalchemy import Engine

from pipeline.broker import Publisher
from pipeline.dispatch.background import Background
from pipeline.dispatch.leader import CHECK_SECONDS
from pipeline.dispatch.scheduler import Scheduler

log = structlog.get_logger()


@dataclass(slots=True)
class Dispatcher:
    """What the duties share: connections, settings, and how far they have come."""

    engine: Engine
    publisher: Publisher
    lease_seconds: float
    text_retention_days: float
    background: Background | None = None
    #: Last chunk id cancelled, by job: going on from there, nothing that is gone is looked at again.
    drained: dict[UUID, int] = field(default_factory=dict)
    #: When each job's progress is next recomputed, by the monotonic clock.
    snapshots: dict[UUID, float] = field(default_factory=dict)
    #: No lease is expired before this moment of the monotonic clock.
    sweep_from: float = 0.0
    #: When the database last answered, by the monotonic clock.
    last_contact: float = field(default_factory=time.monotonic)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.publisher)

    def note_contact(self) -> None:
        """The database has answered; if it hadn't for long, nobody could renew, and the sweep waits."""
        now = time.monotonic()
        if now - self.last_contact > self.lease_seconds / 3 + CHECK_SECONDS:
            log.warning("sweep_waits_after_gap", gap_seconds=round(now - self.last_contact, 1))
            self.sweep_from = now + self.lease_seconds
        self.last_contact = now
