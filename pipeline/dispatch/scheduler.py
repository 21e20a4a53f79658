"""Scheduler: decides for which pending chunks messages are sent, by priority and fair share of workspaces and jobs."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from pipeline.broker import ChunkMessage, Publisher, queue_of
from pipeline.core.jobs import ActiveJob
from pipeline.db import chunks, jobs, lost_claims, models, workers
from pipeline.infra import metrics

#: The least target length of a model's queue, as messages may be lost on their way.
_LEAST_WINDOW = 4
#: The most lost chunks that a pass considers, and the time before another message is sent for the same one.
_LOST_LIMIT = 1_000
_PUBLISH_AGAIN_SECONDS = 5.0


class _Wanted(NamedTuple):
    """Chunk for which a message is to be sent."""

    job_id: UUID
    chunk_id: int
    #: Its last claim was lost.
    lost: bool = False
    #: It goes ahead of all others in its queue.
    first: bool = False


class Scheduler:
    """Scheduler of one dispatcher, with the state that it keeps between passes."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        #: Last chunk id for which a message was sent, by job; a lap ends when it passes the last pending one.
        self.cursors: dict[UUID, int] = {}
        #: Time of the last message for each chunk whose claim was lost, by the monotonic clock.
        self.published: dict[int, float] = {}

    def do(self, connection: Connection) -> None:
        """Send messages for pending chunks until each model's queue holds one per live slot, and at least four.

        Chunks whose claim was lost come on top, and to the front of the queue, as they have waited already. A chunk
        whose last claim ended with its process's death, after an earlier loss of any kind, goes to the end: otherwise
        a text that kills processes would take all of them. With lost chunks a queue holds at most twice as many
        messages, however long no worker takes any.

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
            wanted = self._next_lost(of_model, lost, max(0, min(window, window + room)))
            tokens = Tokens([each for each in in_flight if each.model == name])
            feeds = {job.id: _Feed(connection, self.cursors, job.id, room) for job in of_model}
            wanted += [_Wanted(*chosen) for chosen in choose(of_model, feeds, tokens, room)]
            self._publish(connection, slugs[name], of_model, wanted)
        self.cursors = {job.id: self.cursors.get(job.id, 0) for job in runnable}

    def _lost(self, connection: Connection) -> Sequence[tuple[UUID, int, bool]]:
        """Return the lost chunks that need a message now: (job id, chunk id, True if a text may kill its process).

        They don't wait for the cursor's next lap, as the job may be huge. Messages are repeated every few seconds, as
        they may be lost too.
        """
        now = time.monotonic()
        pending = lost_claims.pending(connection, _LOST_LIMIT)
        self.published = {chunk: self.published[chunk] for _, chunk, _ in pending if chunk in self.published}
        return [
            each
            for each in pending
            if now - self.published.get(each[1], -_PUBLISH_AGAIN_SECONDS) >= _PUBLISH_AGAIN_SECONDS
        ]

    @staticmethod
    def _next_lost(of_model: Sequence[ActiveJob], lost: Sequence[tuple[UUID, int, bool]], most: int) -> list[_Wanted]:
        """Return up to `most` lost chunks for messages that are sent even if the queue is full. The oldest is last, to
        come first in the queue."""
        ids = {job.id for job in of_model}
        oldest = [each for each in lost if each[0] in ids][:most]
        return [
            _Wanted(job_id, chunk_id, lost=True, first=not suspect) for job_id, chunk_id, suspect in reversed(oldest)
        ]

    def _publish(
        self,
        connection: Connection,
        slug: str,
        of_model: Sequence[ActiveJob],
        wanted: Sequence[_Wanted],
    ) -> None:
        """Send messages for chunks of a model's jobs."""
        by_id = {job.id: job for job in of_model}
        places = chunks.places(connection, [each.chunk_id for each in wanted])
        for job_id, chunk_id, lost, first in wanted:
            if (place := places.get(chunk_id)) is None:
                continue  # purged meanwhile
            job = by_id[job_id]
            message = ChunkMessage(job_id=job_id, chunk_id=chunk_id, job=job.name, model=job.model, **place._asdict())
            self._publisher.publish(slug, message, first=first)
            if lost:
                self.published[chunk_id] = time.monotonic()
            metrics.DISPATCHER_MESSAGES_PUBLISHED.labels(queue_of(slug)).inc()


def _slots(live: Sequence[Any]) -> dict[str, int]:
    slots: dict[str, int] = defaultdict(int)
    for worker in live:
        for name in worker["models"]:
            slots[name] += worker["slots"]
    return slots


class _Feed:
    """A job's pending chunks from the cursor on, with wrap-around to the start; each at most once a pass."""

    def __init__(self, connection: Connection, cursors: dict[UUID, int], job_id: UUID, limit: int) -> None:
        self._next = self._read(connection, cursors, job_id, limit)

    def take(self) -> tuple[int, int] | None:
        """Return the next chunk as (id, estimated tokens); `None`: there is none."""
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
    """One model's estimated tokens in flight, by workspace and by job."""

    def __init__(self, in_flight: Iterable[chunks.InFlight] = ()) -> None:
        self._of_workspace: dict[int, int] = defaultdict(int)
        self._of_job: dict[UUID, int] = defaultdict(int)
        for each in in_flight:
            self.add(each.workspace_id, each.job_id, each.tokens)

    def add(self, workspace_id: int, job_id: UUID, tokens: int) -> None:
        """Add the tokens of a job's chunk."""
        self._of_workspace[workspace_id] += tokens
        self._of_job[job_id] += tokens

    def turn(self, job: ActiveJob) -> tuple[Any, ...]:
        """Return a job's sort key: the job with the smallest one is next."""
        share = self._of_workspace[job.workspace_id] / job.weight
        return (-job.priority, share, self._of_job[job.id], job.id)


def choose(
    of_model: Sequence[ActiveJob], feeds: dict[UUID, Any], tokens: Tokens, room: int
) -> Iterator[tuple[UUID, int]]:
    """Yield the chunks to send messages for, as (job id, chunk id), up to `room`.

    The job with the highest priority comes first, then that of the workspace with the fewest tokens in flight for its
    weight, then that with the fewest tokens itself, then the oldest. `tokens` grows with each chosen chunk.
    """
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
