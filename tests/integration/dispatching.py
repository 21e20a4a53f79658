"""Shared helpers of tests of the dispatcher's duties."""

from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy import Engine

from pipeline.broker import Publisher
from pipeline.db import lost_claims, workers
from pipeline.dispatch.state import Dispatcher
from tests.support.jobs_made import taken


def make_dispatcher(engine: Engine, redis_url: str) -> Dispatcher:
    """Make a dispatcher that isn't running. The caller closes its publisher."""
    return Dispatcher(engine=engine, publisher=Publisher(redis_url), lease_seconds=30, text_retention_days=7)


def show_worker(engine: Engine, model: str, slots: int, kinds: Sequence[str] = ("cpu",)) -> UUID:
    """Register a worker that serves a model on devices of these kinds, as the dispatcher sees it."""
    worker = uuid4()
    with engine.begin() as connection:
        workers.show(
            connection,
            worker,
            name="cpu-1@here",
            host="here",
            device="cpu",
            device_kinds=kinds,
            models=[model],
            slots=slots,
        )
    return worker


def lose(engine: Engine, job_id: UUID, ordinal: int) -> None:
    """Claim a chunk and let its lease expire, as for a worker that is never heard of again."""
    taken(engine, job_id, ordinal, lease_seconds=-1)
    with engine.begin() as connection:
        assert lost_claims.expire_leases(connection, 10)


def die(engine: Engine, job_id: UUID, ordinal: int) -> None:
    """Claim a chunk and free the claim, as for a worker whose child process died over it."""
    claim = taken(engine, job_id, ordinal, task=f"of {ordinal}")
    with engine.begin() as connection:
        assert lost_claims.free_lost_claim(connection, claim.chunk_id, claim.worker_id, f"of {ordinal}", "killed")
