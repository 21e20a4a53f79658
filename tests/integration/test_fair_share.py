"""Fair share of the workers: a small job behind a huge one ends in about the time of its share.

The dispatcher and the broker are real. Slots take messages off the queue and commit; time is counted in commits.
"""

import json
from collections.abc import Iterator
from typing import cast
from uuid import UUID

import pytest
import redis
from sqlalchemy import Engine

from pipeline.broker import Publisher, queue_of
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import Claim
from pipeline.core.models import Model
from pipeline.db import chunks, workspaces
from pipeline.dispatch.dispatcher import publish
from pipeline.dispatch.state import Dispatcher
from tests.support.jobs_made import DONE, WORKER, chunk_ids, chunk_rows, make_job, make_model, part_of

_SLOTS = 4
_HUGE, _SMALL = 2_000, 20


@pytest.fixture
def dispatcher(engine: Engine, redis_url: str) -> Iterator[Dispatcher]:
    publisher = Publisher(redis_url)
    yield Dispatcher(engine=engine, publisher=publisher, lease_seconds=600, text_retention_days=7)
    publisher.close()


class Slots:
    """Worker slots that take four chunks at a time, in the queue's order."""

    def __init__(self, engine: Engine, redis_url: str, model: Model) -> None:
        self._engine, self._queue = engine, queue_of(model.slug)
        self._redis = redis.Redis.from_url(redis_url)
        self._running: list[Claim] = []

    def turn(self) -> UUID | None:
        """End the chunk that runs longest and take the next message. Return the job whose chunk ended."""
        ended = self._running.pop(0) if len(self._running) == _SLOTS else None
        if ended:
            write_chunk(self._engine, ended, 0, part_of([ended.first_index]), DONE)
        while len(self._running) < _SLOTS and (message := cast("bytes | None", self._redis.lpop(self._queue))):
            job, chunk = json.loads(message)["headers"]["argsrepr"].partition("(job=")[2].strip(")").split(", chunk=")
            with self._engine.begin() as connection:
                claim = chunks.claim(
                    connection, UUID(job), int(chunk), worker_id=WORKER, task_id="t", lease_seconds=600
                )
            if claim:
                self._running.append(claim)
        return ended.job_id if ended else None

    def close(self) -> None:
        self._redis.close()


def commits_until_done(dispatcher: Dispatcher, slots: Slots, small: UUID) -> int:
    """Return the number of chunks of all jobs that end until the small job is done."""
    own = everybody = 0
    for _ in range(5_000):
        publish(dispatcher)
        ended = slots.turn()
        everybody += ended is not None
        own += ended == small
        if own == _SMALL:
            return everybody
    raise AssertionError("the small job didn't end")


@pytest.mark.parametrize(("weight", "share"), [(1.0, 1 / 2), (3.0, 3 / 4), (1 / 3, 1 / 4)])
def test_a_small_job_ends_in_the_time_of_its_workspaces_share(
    engine: Engine, redis_url: str, dispatcher: Dispatcher, weight: float, share: float
) -> None:
    model = make_model(engine)
    with engine.begin() as connection:
        other = workspaces.create(connection, "other", weight)
    huge = make_job(engine, model, _HUGE, per_chunk=1)
    slots = Slots(engine, redis_url, model)
    for _ in range(20):
        publish(dispatcher)
        slots.turn()
    small = make_job(engine, model, _SMALL, per_chunk=1, workspace=other)
    taken = commits_until_done(dispatcher, slots, small)
    slots.close()
    # The chunks that are already in the queue and in the slots come first.
    assert _SMALL <= taken <= _SMALL / share * 1.3 + 2 * _SLOTS
    assert sum(row["state"] == "done" for row in chunk_rows(engine, huge)) < _HUGE / 2


def test_a_small_job_ends_soon_behind_a_huge_one_of_its_workspace(
    engine: Engine, redis_url: str, dispatcher: Dispatcher
) -> None:
    model = make_model(engine)
    make_job(engine, model, _HUGE, per_chunk=1)
    slots = Slots(engine, redis_url, model)
    for _ in range(20):
        publish(dispatcher)
        slots.turn()
    small = make_job(engine, model, _SMALL, per_chunk=1)
    taken = commits_until_done(dispatcher, slots, small)
    slots.close()
    assert taken <= 2 * _SMALL * 1.3 + 2 * _SLOTS
    assert len(chunk_ids(engine, small)) == _SMALL
