"""The heart: claim → read → encode → commit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import inf
from time import monotonic

import numpy as np
import structlog
from sqlalchemy import Engine

from pipeline.chunk_io.commit import Commit, Ending, split_bad_vectors, write_chunk
from pipeline.chunk_io.reader import Intake, ItemBlock, read_chunk
from pipeline.core.chunks import ChunkState, Claim, Item, Reject, RejectCode
from pipeline.core.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.core.jobs import JobState
from pipeline.core.openai import shortened
from pipeline.core.options import OnLong
from pipeline.db import chunks
from pipeline.db.embeddings import NO_ROWS, Rows
from pipeline.infra.leases import Renewal
from workers import instrumentation
from workers.encoders.batching import CONVICTED, Batch, Encoder, Slice, isolated_slices

log = structlog.get_logger()


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


def run_chunk(engine: Engine, encoder: Encoder, claim: Claim, watch: Watch, on_hang: Callable[[], None]) -> None:
    """Embed a claimed chunk and commit it, whole or in parts.

    Raises:
        LeaseLost: another claim owns the chunk by now.
        SourceError, StorageRefused, StorageUnreachable: a file can't be read or written.
        ModelError: the model stopped working; nothing of what it made since the last commit is written.
        GatewayBusy, GatewayRefused: the chunk is given back, and all that came back from the gateway is committed.
        GatewayChanged: the gateway's model is another one; nothing of what it made since the last commit is written.
    """

    def renew() -> bool:
        if watch.hung:
            on_hang()
        with engine.begin() as connection:
            state = chunks.renew(connection, claim)
        watch.lost = state is None
        watch.cancelled = watch.cancelled or state is JobState.CANCELLING
        return not watch.lost

    with Renewal(renew, claim.lease_seconds):
        with instrumentation.step(claim.model, "read"):
            intake = read_chunk(engine, claim)
        for number, (part, ending) in enumerate(_parts(encoder, claim, intake, watch)):
            with instrumentation.step(claim.model, "write"):
                write_chunk(engine, claim, number, part, ending)
            instrumentation.committed(claim.model, part)
    if watch.interruption:
        raise watch.interruption


def _parts(encoder: Encoder, claim: Claim, intake: Intake, watch: Watch) -> Iterator[tuple[Commit, Ending]]:
    """What to commit, one after the other; the last one ends the chunk or gives it back."""
    level, left = claim.isolation, intake.left
    for number, block in enumerate(instrumentation.while_read(claim.model, intake.blocks)):
        if number == 0:  # a file that takes long to unpack must not take all the time again and again
            watch.began = monotonic()
        for step in _parts_of(encoder, claim, block, level, watch):
            left -= step.part.settled
            # Whatever the watch says, what is under way is still awaited.
            state = ChunkState.RUNNING if step.goes_on and left else _state(left, watch)
            yield step.part, _ending(state, step.next_level if left else 0, watch)
            if state is not ChunkState.RUNNING:
                return
        # What a later block holds wasn't under way when the last claim was lost.
        level = min(level, 1)


@dataclass(frozen=True, slots=True)
class _Step:
    """A part of a block."""

    part: Commit
    #: The isolation level of what comes after it.
    next_level: int
    #: More of the same slice is under way.
    goes_on: bool = False


def _parts_of(encoder: Encoder, claim: Claim, block: ItemBlock, level: int, watch: Watch) -> Iterator[_Step]:
    items, rejects = block.items, list(block.rejects)
    if level >= CONVICTED and items:
        head, items, level = items[0], items[1:], 1
        log.warning("item_convicted", index=head.index)
        message = "its worker died twice while this text was embedded alone"
        rejects.append(_reject(head, RejectCode.CRASHED_WORKER, message))
    if rejects:  # on disk before the model sees an item that may kill its process
        yield _Step(Commit(rows=NO_ROWS, rejects=rejects), level)
    slices = list(isolated_slices(len(items), level)) if level and items else [Slice(0, len(items), 0)]
    for this, following in zip_longest(slices, slices[1:]):
        embedding = _Embedding(encoder, claim, items[this.start : this.stop], watch)
        for part in embedding.parts():
            yield _Step(part, this.level, goes_on=True)
        yield _Step(embedding.last_part(), following.level if following else min(level, 1))


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
    return ChunkState.PENDING if watch.must_stop else ChunkState.RUNNING


class _Embedding:
    """A slice on its way through the encoder: what has been made and isn't handed over yet."""

    def __init__(self, encoder: Encoder, claim: Claim, items: Sequence[Item], watch: Watch) -> None:
        self._encoder, self._claim, self._watch = encoder, claim, watch
        watch.beat()
        with instrumentation.step(claim.model, "tokenise"):
            tokenised = encoder.tokenise([item.text for item in items], claim.max_item_tokens)
        self._rejects: list[Reject] = []
        if claim.options.on_long is OnLong.REJECT:
            self._rejects = [_too_long(items[at], claim) for at in np.flatnonzero(tokenised.truncated).tolist()]
            items = [item for item, cut in zip(items, tokenised.truncated, strict=True) if not cut]
            tokenised = tokenised.select(~tokenised.truncated)
        self._items, self._tokenised = items, tokenised
        self._vectors = np.zeros((len(items), encoder.dimensions), dtype=np.float32)
        self._made = np.zeros(len(items), dtype=np.bool_)
        self._tokens, self._truncated = tokenised.lengths.copy(), tokenised.truncated.copy()
        self._seconds = 0.0

    def parts(self) -> Iterator[Commit]:
        """Embed until all is done or the watch says stop, and hand over what has been made now and then; the rest of
        it is the last part.

        Raises:
            GatewayChanged: nothing of what was made since the last part may be written.
        """
        due = monotonic() + self._watch.commit_seconds
        try:
            for batch in self._encoder.batches(self._tokenised, lambda: self._watch.must_stop):
                self._watch.beat()
                self._add(batch)
                if monotonic() > due:
                    part, bad = self._taken()
                    if _is_suspect(part, bad):  # whose fault that is must be known first
                        due = inf
                        continue
                    self._forget()
                    with self._watch.resting():
                        yield part
                    due = monotonic() + self._watch.commit_seconds
        except GatewayChanged:
            raise
        except (GatewayBusy, GatewayRefused) as error:
            self._watch.interruption = error
        self._watch.rest()

    def last_part(self) -> Commit:
        """What `parts` has left over.

        Raises:
            ModelError, GatewayChanged: something came out wrong, and the canary does so too: it isn't the items' fault.
        """
        part, bad = self._taken()
        if _is_suspect(part, bad):
            try:
                self._encoder.prove_again()
            except GatewayChanged:
                raise
            except (GatewayBusy, GatewayRefused) as error:  # who is to blame can't be told now
                self._watch.interruption, bad = error, []
        return replace(part, rejects=[*part.rejects, *bad])

    def _add(self, batch: Batch) -> None:
        instrumentation.ran(self._claim.model, batch)
        self._seconds += batch.seconds
        if batch.failure:
            self._rejects += [_reject(self._items[at], *batch.failure) for at in batch.at.tolist()]
        else:
            self._vectors[batch.at], self._made[batch.at] = batch.vectors, True
            self._tokens[batch.at], self._truncated[list(batch.truncated)] = batch.tokens, True

    def _taken(self) -> tuple[Commit, list[Reject]]:
        """What has been made, and items whose vectors must not be written."""
        made, items = self._made, [item for item, done in zip(self._items, self._made, strict=True) if done]
        vectors = self._vectors[made]
        if vectors.shape[1] != self._claim.dimensions:
            vectors = shortened(vectors, self._claim.dimensions)
        rows = Rows(
            indexes=np.array([item.index for item in items], dtype=np.int64),
            keys=[item.key for item in items],
            vectors=vectors,
            tokens=self._tokens[made],
            truncated=self._truncated[made],
            carried=[item.carried for item in items] if self._claim.carries else (),
        )
        rows, bad = split_bad_vectors(rows, self._claim.dimensions, self._claim.options.dtype)
        return Commit(rows=rows, rejects=self._rejects, device_seconds=self._seconds), bad

    def _forget(self) -> None:
        """What has been taken is handed over."""
        self._made[:] = False
        self._rejects, self._seconds = [], 0.0


def _is_suspect(part: Commit, bad: Sequence[Reject]) -> bool:
    """Whether something came out wrong, by the fault of an item or of the model."""
    return bool(bad) or any(reject.code is RejectCode.ENCODE_FAILED for reject in part.rejects)


def _too_long(item: Item, claim: Claim) -> Reject:
    return _reject(item, RejectCode.TOO_LONG, f"more than {claim.max_item_tokens} tokens")


def _reject(item: Item, code: RejectCode, message: str) -> Reject:
    return Reject(index=item.index, key=item.key, code=code, message=message)
