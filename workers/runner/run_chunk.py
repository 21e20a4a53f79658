"""Core of a worker: claim → read → encode → commit.

    chunk   ┌─────────────────────────────────────────────┐   claimed under a lease, with a fence and a token
    block   ├──────────────────────┬──────────────────────┤   as much text as is read at once
    slice   ├───────┬───────┬──────┼───────┬───────┬──────┤   encoded as one: a whole block, or less while the
            │       │       │      │       │       │      │   search for a text that kills its process narrows
    batch   ├─┬─┬─┬─┤       │      │       │       │      │   one forward pass, or one request to an upstream
    commit  └───▲───┴───▲───┴──▲───┴───▲───┴───▲───┴──▲───┘   at the end of each slice, and at intervals within one

Each commit is one transaction that begins with the fenced update. The last one ends the chunk, or gives it back.

While a block is embedded, the next one is read and tokenised, and the commit before is written, in two threads. Not so
in a search: there a commit is on disk before the model sees the next slice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from time import monotonic
from typing import NamedTuple

import structlog
from sqlalchemy import Engine

from pipeline.chunk_io.commit import Commit, Ending, while_database_is_away, write_chunk
from pipeline.chunk_io.reader import ItemBlock, UnsettledItems, read_chunk
from pipeline.core.chunks import ChunkState, Claim, Item, Reject, RejectCode
from pipeline.core.errors import GatewayBusy, LeaseLost
from pipeline.core.jobs import JobState
from pipeline.db import chunks
from pipeline.db.embeddings import NO_ROWS
from pipeline.infra.ahead import ahead
from pipeline.infra.leases import Renewal
from workers import instrumentation
from workers.encoders.batching import CONVICTED, Encoder, Slice, isolated_slices
from workers.runner.outcome import Tally
from workers.runner.overlap import InOrder
from workers.runner.reuse import SortedItems, known_vectors, sort_out, with_followers
from workers.runner.slice_encoding import SliceEncoding, reject
from workers.watchdog import Watch

log = structlog.get_logger()

#: First and longest time for which a chunk is given back whose last texts another one embeds; it doubles each time.
_ELSEWHERE_SECONDS, _MOST_ELSEWHERE_SECONDS = 2.0, 8.0


def run_chunk(engine: Engine, encoder: Encoder, claim: Claim, watch: Watch, on_hang: Callable[[], None]) -> Tally:
    """Embed a claimed chunk and commit it, whole or piece by piece. Return what was committed.

    Raises:
        LeaseLost: the chunk is no longer this claim's.
        SourceError, StorageRefused, StorageUnreachable: a file can't be read or written.
        ModelError: the model stopped working; its vectors since the last commit aren't written.
        GatewayBusy, GatewayRefused: the chunk is given back, after all that the upstream returned is committed.
        GatewayChanged: the upstream's model is another one; its vectors since the last commit aren't written.
    """
    begin = monotonic()
    watch.progressed = not claim.options.splits
    with Renewal(_renewal(engine, claim, watch, on_hang), claim.lease_seconds), InOrder(watch.fail) as commits:
        with instrumentation.step(claim.model, "read"):
            unsettled = read_chunk(engine, claim)
        number, tally = -1, Tally()
        state = ChunkState.DONE  # also of a chunk without an item that is left
        work = _Work(engine, encoder, claim, watch, commits.wait)
        for number, (commit, ending) in enumerate(_commits(work, unsettled)):
            commits.begin(partial(_write, engine, claim, number, commit, ending))
            tally.add(commit)
            state = ending.state
            if claim.isolation:
                commits.wait()
        commits.wait()
        if work.deferred:
            _give_back(engine, claim, number + 1)
    if watch.interruption:
        raise watch.interruption
    tally.seconds = monotonic() - begin
    if work.deferred:
        tally.given_back = "another chunk embeds the same texts"
    elif state is ChunkState.PENDING:
        tally.cancelled = watch.cancelled
        tally.given_back = None if watch.cancelled else "its time is up"
    return tally


def _write(engine: Engine, claim: Claim, number: int, commit: Commit, ending: Ending) -> None:
    with instrumentation.step(claim.model, "write"):
        write_chunk(engine, claim, number, commit, ending)
    instrumentation.committed(claim.model, commit)


def _give_back(engine: Engine, claim: Claim, number: int) -> None:
    """Give back a chunk after `number` commits, with texts that another one embeds.

    Not by a commit: that would count as progress of the model.
    """
    seconds = min(_MOST_ELSEWHERE_SECONDS, _ELSEWHERE_SECONDS * 2.0 ** min(claim.fence - 1, 4))
    progress = chunks.Progress(state=ChunkState.PENDING, not_before_seconds=seconds)
    for attempt in while_database_is_away("give_back_retried"):
        with attempt, engine.begin() as connection:
            if not chunks.record(connection, claim, progress, number=number):
                raise LeaseLost
    log.info("texts_embedded_elsewhere", seconds=seconds)


def _renewal(engine: Engine, claim: Claim, watch: Watch, on_hang: Callable[[], None]) -> Callable[[], bool]:
    """Return the function that renews the lease, notes a cancellation, and checks for a batch that hangs."""

    def renew() -> bool:
        if watch.hung:
            on_hang()
        with engine.begin() as connection:
            state = chunks.renew(connection, claim)
        watch.lost = state is None
        watch.cancelled = watch.cancelled or state is JobState.CANCELLING
        return not watch.lost

    return renew


@dataclass(slots=True)
class _Work:
    """Means of a claim, and its items whose texts another chunk embeds."""

    engine: Engine
    encoder: Encoder
    claim: Claim
    watch: Watch
    #: Waits until all commits are written.
    wait: Callable[[], None]
    deferred: list[Item] = field(default_factory=list)


def _commits(work: _Work, unsettled: UnsettledItems) -> Iterator[tuple[Commit, Ending]]:
    """Yield the chunk's commits in order; the last one ends the chunk or gives it back, unless items are deferred."""
    claim, watch = work.claim, work.watch
    level, left = claim.isolation, unsettled.left
    parts = _sorted_out(work, instrumentation.while_read(claim.model, unsettled.blocks))
    for number, part in enumerate(_with_deferred(work, parts if claim.isolation else ahead(parts))):
        if number == 0:  # unpacking a large file must not use up the time limit at every claim
            watch.began = monotonic()
        for step in _steps(work, part, level):
            left -= step.commit.settled
            # Within a slice the claim is kept even if the watch says stop: batches in flight are still awaited.
            state = ChunkState.RUNNING if step.goes_on and left else _state(left, watch)
            yield step.commit, _ending(state, step.next_level if left else 0, watch)
            if state is not ChunkState.RUNNING:
                work.deferred = []
                return
        work.deferred += part.sorted.deferred
        # Items of a later block weren't in progress when the last claim was lost.
        level = min(level, 1)


class _Part(NamedTuple):
    """A block with what becomes of its items."""

    rejects: Sequence[Reject]
    sorted: SortedItems
    #: Encoding of all that is to be embedded; None in a search, which encodes slice by slice.
    whole: SliceEncoding | None


def _sorted_out(work: _Work, blocks: Iterator[ItemBlock]) -> Iterator[_Part]:
    """Yield the blocks, tokenised if they are encoded whole, as outside of a search."""
    for block in blocks:
        with instrumentation.step(work.claim.model, "read"):
            found = sort_out(work.engine, work.claim, block.items)
        whole = None if work.claim.isolation else SliceEncoding(work.encoder, work.claim, found.items, work.watch)
        yield _Part(block.rejects, found, whole)


def _with_deferred(work: _Work, parts: Iterator[_Part]) -> Iterator[_Part]:
    """Yield parts, and at last what was deferred, as it is once all of this claim's vectors are written."""
    yield from parts
    if items := work.deferred:
        work.wait()
        work.deferred = []
        yield from _sorted_out(work, iter([ItemBlock(items)]))


class _Step(NamedTuple):
    """One commit of a block."""

    commit: Commit
    #: Isolation level of the items after it.
    next_level: int
    #: True if more of the same slice is still being encoded.
    goes_on: bool = False


def _steps(work: _Work, part: _Part, level: int) -> Iterator[_Step]:
    claim = work.claim
    items, rejects = part.sorted.items, list(part.rejects)
    if level >= CONVICTED and items:
        head, items, level = items[0], items[1:], 1
        log.warning("item_convicted", index=head.index)
        message = "its worker died twice while this text was embedded alone"
        rejects.append(reject(head, RejectCode.CRASHED_WORKER, message))
    if rejects:  # on disk before the model sees an item that may kill its process
        yield _Step(Commit(rows=NO_ROWS, rejects=rejects), level)
    for commit in known_vectors(work.engine, claim, part.sorted):
        yield _Step(commit, level)
    if not items and (part.sorted.known or part.sorted.deferred):
        return
    slices = list(isolated_slices(len(items), level)) if level and items else [Slice(0, len(items), 0)]
    for this, following in zip_longest(slices, slices[1:]):
        encoding = part.whole or SliceEncoding(work.encoder, claim, items[this.start : this.stop], work.watch)
        for commit in encoding.commits():
            yield _Step(with_followers(commit, part.sorted.followers, claim), this.level, goes_on=True)
        last = with_followers(encoding.last_commit(), part.sorted.followers, claim)
        yield _Step(last, following.level if following else min(level, 1))


def _state(left: int, watch: Watch) -> ChunkState:
    """Return the chunk's state after a commit that leaves `left` items in it."""
    if not left:
        return ChunkState.DONE
    return ChunkState.PENDING if watch.must_stop else ChunkState.RUNNING


def _ending(state: ChunkState, isolation: int, watch: Watch) -> Ending:
    interruption = watch.interruption if state is ChunkState.PENDING else None
    wait = interruption.wait_seconds if isinstance(interruption, GatewayBusy) else 0.0
    return Ending(
        state=state, isolation=isolation, not_before_seconds=wait, error=str(interruption) if interruption else None
    )
