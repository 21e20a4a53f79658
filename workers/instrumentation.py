"""Metrics and logs of a child that runs chunks, by step, batch, commit and claim."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter

import structlog
from sqlalchemy.exc import DBAPIError

from pipeline.chunk_io.commit import Commit
from pipeline.chunk_io.reader import ItemBlock
from pipeline.core.errors import (
    GatewayBusy,
    GatewayRefused,
    LeaseLost,
    ModelError,
    SourceError,
    StorageRefused,
    StorageUnreachable,
)
from pipeline.db.database import is_connection_lost
from pipeline.infra import metrics
from workers.encoders.batching import Batch

log = structlog.get_logger()

#: Outcome of a claim by the error that ended it; the first match counts. Any other error ends the child.
_OUTCOMES: tuple[tuple[type[Exception], str], ...] = (
    (GatewayBusy, "busy"),
    (GatewayRefused, "refused"),
    (LeaseLost, "lost"),
    (ModelError, "unusable"),
    (DBAPIError, "given_back"),
    (SourceError, "given_back"),
    (StorageRefused, "given_back"),
    (StorageUnreachable, "given_back"),
)


@cache
def _begin(model: str) -> None:
    """Create a model's counters at zero: a counter that first appears with a value shows no increase."""
    for outcome in metrics.CLAIM_OUTCOMES:
        metrics.WORKER_CLAIMS.labels(model, outcome)
    for outcome in metrics.ITEM_OUTCOMES:
        metrics.WORKER_ITEMS.labels(model, outcome)


def let_go(model: str, outcome: str) -> None:
    """Count a message that led to no claim."""
    _begin(model)
    metrics.WORKER_CLAIMS.labels(model, outcome).inc()


@contextmanager
def claimed(model: str) -> Iterator[None]:
    """Time a claim, and log and count its outcome."""
    _begin(model)
    begin, outcome = perf_counter(), "done"
    try:
        yield
    except Exception as error:
        outcome = _outcome(error)
        raise
    finally:
        seconds = perf_counter() - begin
        log.info("chunk_ended", model=model, outcome=outcome, seconds=round(seconds, 3))
        metrics.WORKER_CHUNK_SECONDS.labels(model).observe(seconds)
        metrics.WORKER_CLAIMS.labels(model, outcome).inc()
        if outcome == "lost":
            metrics.WORKER_LEASES_LOST.labels("overtaken").inc()


def _outcome(error: Exception) -> str:
    if isinstance(error, DBAPIError) and is_connection_lost(error):
        return "away"
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), "crashed")


@contextmanager
def step(model: str, name: str) -> Iterator[None]:
    """Time a step of a slot: `read`, `tokenise` or `write`. The time of `embed` is counted by `ran`."""
    begin = perf_counter()
    try:
        yield
    finally:
        metrics.WORKER_STEP_SECONDS.labels(model, name).observe(perf_counter() - begin)


def while_read(model: str, blocks: Iterator[ItemBlock]) -> Iterator[ItemBlock]:
    """Yield blocks and time their reading; each one is read when it is asked for."""
    while True:
        with step(model, "read"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def ran(model: str, batch: Batch) -> None:
    """Count a batch that came back, and its time."""
    metrics.WORKER_STEP_SECONDS.labels(model, "embed").observe(batch.seconds)
    if batch.vectors is None:
        return
    metrics.WORKER_BATCHES.labels(model).inc()
    metrics.WORKER_TOKENS.labels(model).inc(int(batch.tokens.sum()))
    if batch.padded_tokens:
        metrics.WORKER_PADDED_TOKENS.labels(model).inc(batch.padded_tokens)
    if batch.roofline_seconds:
        metrics.WORKER_ROOFLINE_SECONDS.labels(model).inc(batch.roofline_seconds)


def committed(model: str, part: Commit) -> None:
    """Count the items and rejects of a part that is committed to Postgres."""
    metrics.WORKER_ITEMS.labels(model, "embedded").inc(part.rows.items)
    metrics.WORKER_ITEMS.labels(model, "reused").inc(part.copies.items)
    metrics.WORKER_ITEMS.labels(model, "rejected").inc(len(part.rejects))
    for code, times in Counter(reject.code for reject in part.rejects).items():
        metrics.WORKER_REJECTS.labels(code).inc(times)


def answered(model: str, status: int, seconds: float) -> None:
    """Count an upstream's answer to a request; status 0 means that none came."""
    kind = "429" if status == 429 else f"{status // 100}xx" if 200 <= status < 600 else "none"
    metrics.WORKER_GATEWAY_REQUESTS.labels(model, kind).inc()
    metrics.WORKER_GATEWAY_SECONDS.labels(model).observe(seconds)


def waited(model: str, seconds: float) -> None:
    """Count the time that a request waited for its upstream's limits."""
    metrics.WORKER_THROTTLE_WAIT_SECONDS.labels(model).inc(max(0.0, seconds))
