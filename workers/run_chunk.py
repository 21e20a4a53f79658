"""The heart: claim → read → encode → commit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from time import monotonic

import numpy as np
import structlog
from sqlalchemy import Engine

from pipeline.errors import GatewayBusy, GatewayRefused
from pipeline.intake import Intake, Serving, read_chunk
from pipeline.jobs import ChunkState, Claim, Item, JobState, Reject, RejectCode
from pipeline.leases import Renewal
from pipeline.store import chunks
from pipeline.store.embeddings import NO_ROWS, Rows
from pipeline.writeback import Ending, Part, split_bad_vectors, write_chunk
from workers.batching import CONVICTED, Encoder, Slice, isolated_slices

log = structlog.get_logger()


@dataclass(slots=True)
class Watch:
    """What the renewal thread and the batches tell each other while a chunk runs."""

    #: A batch that takes longer has hung.
    hung_after_seconds: float
    #: The chunk is given back when it has taken so long.
    most_seconds: float
    began: float = field(default_factory=monotonic)
    #: Infinite while no batch is under way.
    last_batch: float = inf
    cancelled: bool = False
    #: Why nothing more comes of the chunk for now: its gateway lets nothing through.
    interruption: GatewayBusy | GatewayRefused | None = None

    def beat(self) -> None:
        """A batch begins: the first one, or the one after that which has just ended."""
        self.last_batch = monotonic()

    def rest(self) -> None:
        """No batch is under way. Waiting for a database that is away is no hang."""
        self.last_batch = inf

    @property
    def hung(self) -> bool:
        """Whether a batch has been under way for too long."""
        return monotonic() - self.last_batch > self.hung_after_seconds

    @property
    def must_stop(self) -> bool:
        """Whether to commit what there is and let go of the rest."""
        return self.cancelled or self.interruption is not None or monotonic() - self.began > self.most_seconds


def run_chunk(engine: Engine, encoder: Encoder, claim: Claim, watch: Watch, on_hang: Callable[[], None]) -> None:
    """Embed a claimed chunk and commit it, whole or in parts.

    Raises:
        LeaseLost: another claim owns the chunk by now.
        SourceError, StorageRefused, StorageUnreachable: a file can't be read or written.
        ModelError: the model stopped working; nothing of what it made since the last commit is written.
        GatewayBusy, GatewayRefused: the chunk is given back, and all that came back from the gateway is committed.
    """

    def renew() -> bool:
        if watch.hung:
            on_hang()
        with engine.begin() as connection:
            state = chunks.renew(connection, claim)
        watch.cancelled = watch.cancelled or state is None or state is JobState.CANCELLING
        return state is not None

    with Renewal(renew, claim.lease_seconds):
        for number, (part, ending) in enumerate(_parts(encoder, claim, read_chunk(engine, claim), watch)):
            write_chunk(engine, claim, number, part, ending)
    if watch.interruption:
        raise watch.interruption


def _parts(encoder: Encoder, claim: Claim, intake: Intake, watch: Watch) -> Iterator[tuple[Part, Ending]]:
    """What to commit, one after the other; the last one ends the chunk or gives it back."""
    level, left = claim.isolation, intake.left
    for serving in intake.servings:
        for part, next_level in _parts_of(encoder, claim, serving, level, watch):
            left -= part.settled
            state = _state(left, watch)
            yield part, _ending(state, next_level if left else 0, watch)
            if state is not ChunkState.RUNNING:
                return
        # What a later serving holds wasn't under way when the last claim was lost.
        level = min(level, 1)


def _parts_of(encoder: Encoder, claim: Claim, serving: Serving, level: int, watch: Watch) -> Iterator[tuple[Part, int]]:
    """The parts of a serving, each with the isolation level of what comes after it."""
    items, rejects = serving.items, list(serving.rejects)
    if level >= CONVICTED and items:
        head, items, level = items[0], items[1:], 1
        log.warning("item_convicted", index=head.index)
        message = "its worker died twice while this text was embedded alone"
        rejects.append(_reject(head, RejectCode.CRASHED_WORKER, message))
    if rejects:  # on disk before the model sees an item that may kill its process
        yield Part(rows=NO_ROWS, rejects=rejects), level
    slices = list(isolated_slices(len(items), level)) if level and items else [Slice(0, len(items), 0)]
    for this, following in zip_longest(slices, slices[1:]):
        part = _embed(encoder, claim, items[this.start : this.stop], watch)
        yield part, following.level if following else min(level, 1)


def _ending(state: ChunkState, isolation: int, watch: Watch) -> Ending:
    interruption = watch.interruption if state is ChunkState.PENDING else None
    wait = interruption.wait_seconds if isinstance(interruption, GatewayBusy) else 0.0
    return Ending(
        state=state, isolation=isolation, not_before_seconds=wait, error=str(interruption) if interruption else None
    )


def _state(left: int, watch: Watch) -> ChunkState:
    """Where a commit leaves the chunk, with so many items left in it."""
    if not left:
        return ChunkState.DONE
    if watch.cancelled:
        return ChunkState.CANCELLED
    return ChunkState.PENDING if watch.must_stop else ChunkState.RUNNING


def _embed(encoder: Encoder, claim: Claim, items: Sequence[Item], watch: Watch) -> Part:
    """Embed items until they are done or the watch says stop.

    Raises:
        ModelError: something came out wrong, and the canary does so too: it isn't the items' fault.
    """
    watch.beat()
    tokenised = encoder.tokenise([item.text for item in items], claim.max_item_tokens)
    rejects: list[Reject] = []
    if claim.reject_long:
        rejects = [_too_long(items[at], claim) for at in np.flatnonzero(tokenised.truncated).tolist()]
        items = [item for item, cut in zip(items, tokenised.truncated, strict=True) if not cut]
        tokenised = tokenised.select(~tokenised.truncated)
    vectors = np.zeros((len(items), encoder.dimensions), dtype=np.float32)
    made = np.zeros(len(items), dtype=np.bool_)
    failed: list[Reject] = []
    seconds = 0.0
    tokens, truncated = tokenised.lengths.copy(), tokenised.truncated.copy()
    try:
        for batch in encoder.batches(tokenised, lambda: watch.must_stop):
            watch.beat()
            seconds += batch.seconds
            if batch.failure:
                failed += [_reject(items[at], *batch.failure) for at in batch.at.tolist()]
            else:
                vectors[batch.at], made[batch.at] = batch.vectors, True
                tokens[batch.at], truncated[list(batch.truncated)] = batch.tokens, True
    except (GatewayBusy, GatewayRefused) as error:
        watch.interruption = error
    watch.rest()
    rows = Rows(
        indexes=np.array([item.index for item, done in zip(items, made, strict=True) if done], dtype=np.int64),
        keys=[item.key for item, done in zip(items, made, strict=True) if done],
        vectors=vectors[made],
        tokens=tokens[made],
        truncated=truncated[made],
        carried=[item.carried for item, done in zip(items, made, strict=True) if done] if claim.carries else (),
    )
    rows, bad = split_bad_vectors(rows, claim.dimensions, half=claim.half)
    if bad or any(reject.code is RejectCode.ENCODE_FAILED for reject in failed):
        try:
            encoder.prove_again()
        except (GatewayBusy, GatewayRefused) as error:  # who is to blame can't be told now
            watch.interruption, bad = error, []
    return Part(rows=rows, rejects=[*rejects, *failed, *bad], device_seconds=seconds)


def _too_long(item: Item, claim: Claim) -> Reject:
    return _reject(item, RejectCode.TOO_LONG, f"more than {claim.max_item_tokens} tokens")


def _reject(item: Item, code: RejectCode, message: str) -> Reject:
    return Reject(index=item.index, key=item.key, code=code, message=message)
