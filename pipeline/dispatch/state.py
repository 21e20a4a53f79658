"""In-memory state of a dispatcher: connections, settings, and the progress of its duties.

It may be lost at any time: a dispatcher that starts anew only sends a few messages twice.
"""

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
    """State that the duties share: connections, settings, and their progress."""

    engine: Engine
    publisher: Publisher
    lease_seconds: float
    text_retention_days: float
    background: Background | None = None
    #: Last cancelled chunk id, by job: a cursor, so that cancelled chunks aren't read again.
    drained: dict[UUID, int] = field(default_factory=dict)
    #: Times at which each job's progress is recomputed next, by the monotonic clock.
    snapshots: dict[UUID, float] = field(default_factory=dict)
    #: Time before which the sweep expires no lease, by the monotonic clock.
    sweep_from: float = 0.0
    #: Time of the database's last answer, by the monotonic clock.
    last_contact: float = field(default_factory=time.monotonic)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.publisher)

    def note_contact(self) -> None:
        """Note that the database has answered. After a long gap, in which no worker could renew, delay the sweep."""
        now = time.monotonic()
        if now - self.last_contact > self.lease_seconds / 3 + CHECK_SECONDS:
            log.warning("sweep_waits_after_gap", gap_seconds=round(now - self.last_contact, 1))
            self.sweep_from = now + self.lease_seconds
        self.last_contact = now
