"""The scheduler: the pending chunks that workers are told of, in fair shares of workspaces and jobs."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from pipeline.broker import Publisher, queue_of
from pipeline.core.jobs import ActiveJob
from pipeline.db import chunks, jobs, lost_claims, models, workers
from pipeline.infra import metrics

#: What a model's queue holds at least, as messages may be lost on their way.
_LEAST_WINDOW = 4
#: Lost chunks that are looked at in a round, and how long one that was rung for isn't rung for again.
_LOST_LIMIT = 1_000
_RING_AGAIN_SECONDS = 5.0


class Scheduler:
    """One dispatcher's scheduling, round after round."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        #: Last chunk id rung for, by job; a lap over when it passes the last pending one.
        self.cursors: dict[UUID, int] = {}
        #: When a chunk whose claim was lost was last rung for, by the monotonic clock.
        self.rung: dict[int, float] = {}

    def do(self, connection: Connection) -> None:
        """Ring for pending chunks until each model's queue holds one message a live slot, at least four. Those whose
        claim was lost come on top, and to the front: they have waited already. One whose process died, and not for the
        first time, waits its turn, or a text that kills processes would have them all to itself. With them a queue
        holds twice as much, no more, however long nobody takes any.

        Raises:
            ServiceUnreachable: Redis doesn't answer.
        """
        runnable = [job for job in jobs.active(connection) if job.is_runnable]
        if not runnable:
            self.cursors.clear()
            return
        slugs = {row["name"]: row["slug"] for row in models.every(connection)}
        slots = _slots(workers.live(connection))
        in_flight = chunks.tokens_in_flight(connection)
        lost = self._lost(connection)
        by_model = defaultdict(list)
        for job in runnable:
            if job.model in slugs:
                by_model[job.model].append(job)
        waiting = self._publisher.waiting([slugs[name] for name in by_model])
        for name, of_model in by_model.items():
            window = max(_LEAST_WINDOW, slots[name])
            room = window - waiting[slugs[name]]
            self._ring_lost(slugs[name], of_model, lost, max(0, min(window, window + room)))
            tokens = Tokens([each for each in in_flight if each.model == name])
            feeds = {job.id: _Feed(connection, self.cursors, job.id, room) for job in of_model}
            for job_id, chunk_id in choose(of_model, feeds, tokens, room):
                self._ring(slugs[name], job_id, chunk_id)
        self.cursors = {job.id: self.cursors.get(job.id, 0) for job in runnable}

    def _lost(self, connection: Connection) -> Sequence[tuple[UUID, int, bool]]:
        """Chunks whose claim was lost, to ring for now, and whether a text may do it. They don't wait for the cursor's
        next lap, as the job may be huge; each is rung for now and then, as its message may be lost too."""
        now = time.monotonic()
        pending = lost_claims.pending(connection, _LOST_LIMIT)
        self.rung = {chunk: self.rung[chunk] for _, chunk, _ in pending if chunk in self.rung}
        return [each for each in pending if now - self.rung.get(each[1], -_RING_AGAIN_SECONDS) >= _RING_AGAIN_SECONDS]

    def _ring_lost(
        self, slug: str, of_model: Sequence[ActiveJob], lost: Sequence[tuple[UUID, int, bool]], most: int
    ) -> None:
        """Ring for lost chunks, whatever waits already. At the front the oldest comes first, so it's rung for last."""
        ids = {job.id for job in of_model}
        oldest = [each for each in lost if each[0] in ids][:most]
        for job_id, chunk_id, suspect in reversed(oldest):
            self.rung[chunk_id] = time.monotonic()
            self._ring(slug, job_id, chunk_id, first=not suspect)

    def _ring(self, slug: str, job_id: UUID, chunk_id: int, *, first: bool = False) -> None:
        self._publisher.ring(slug, job_id, chunk_id, first=first)
        metrics.DISPATCHER_MESSAGES_PUBLISHED.labels(queue_of(slug)).inc()


def _slots(live: Sequence[Any]) -> dict[str, int]:
    slots: dict[str, int] = defaultdict(int)
    for worker in live:
        for name in worker["models"]:
            slots[name] += worker["slots"]
    return slots


class _Feed:
    """A job's pending chunks, each at most once a round, from the cursor on, past the end to the start."""

    def __init__(self, connection: Connection, cursors: dict[UUID, int], job_id: UUID, limit: int) -> None:
        self._next = self._read(connection, cursors, job_id, limit)

    def take(self) -> tuple[int, int] | None:
        """The next chunk as (id, estimated tokens)."""
        return next(self._next, None)

    @staticmethod
    def _read(connection: Connection, cursors: dict[UUID, int], job_id: UUID, limit: int) -> Iterator[tuple[int, int]]:
        start = cursors.get(job_id, 0)
        found = list(chunks.pending_after(connection, job_id, start, limit))
        if len(found) < limit and start:
            first_lap = {chunk_id for chunk_id, _ in found}
            again = chunks.pending_after(connection, job_id, 0, limit - len(found))
            found += [chunk for chunk in again if chunk[0] not in first_lap]
        for chunk_id, tokens in found:
            cursors[job_id] = chunk_id
            yield chunk_id, tokens


class Tokens:
    """Estimated tokens in flight of one model, by workspace and by job."""

    def __init__(self, in_flight: Iterable[chunks.InFlight] = ()) -> None:
        self._of_workspace: dict[int, int] = defaultdict(int)
        self._of_job: dict[UUID, int] = defaultdict(int)
        for each in in_flight:
            self.add(each.workspace_id, each.job_id, each.tokens)

    def add(self, workspace_id: int, job_id: UUID, tokens: int) -> None:
        """Count a chunk of a job."""
        self._of_workspace[workspace_id] += tokens
        self._of_job[job_id] += tokens

    def turn(self, job: ActiveJob) -> tuple[Any, ...]:
        """Whose turn it is: the least."""
        share = self._of_workspace[job.workspace_id] / job.weight
        return (-job.priority, share, self._of_job[job.id], job.id)


def choose(
    of_model: Sequence[ActiveJob], feeds: dict[UUID, Any], tokens: Tokens, room: int
) -> Iterator[tuple[UUID, int]]:
    """Which chunks to ring for: priority first, then the workspace with the fewest tokens in flight for its weight,
    then its job with the fewest, then the oldest. `tokens` grows with what is chosen."""
    open_jobs = list(of_model)
    while room > 0 and open_jobs:
        job = min(open_jobs, key=tokens.turn)
        chunk = feeds[job.id].take()
        if chunk is None:
            open_jobs.remove(job)
            continue
        tokens.add(job.workspace_id, job.id, max(1, chunk[1]))
        room -= 1
        yield job.id, chunk[0]
