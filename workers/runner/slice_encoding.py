"""Encoding of a slice, and the commits that it yields."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from time import monotonic

import numpy as np

from pipeline.chunk_io.commit import Commit, split_bad_vectors
from pipeline.core.chunks import Claim, Item, Reject, RejectCode
from pipeline.core.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.core.openai import shortened
from pipeline.core.options import OnLong
from pipeline.db.embeddings import EmbeddedRows
from workers import instrumentation
from workers.encoders.batching import Batch, Encoder
from workers.watchdog import Watch


class SliceEncoding:
    """Slice that is being encoded, with the results that aren't handed over yet."""

    def __init__(self, encoder: Encoder, claim: Claim, items: Sequence[Item], watch: Watch) -> None:
        self._encoder, self._claim, self._watch = encoder, claim, watch
        watch.beat()
        try:
            with instrumentation.step(claim.model, "tokenise"):
                tokenised = encoder.tokenise([item.text for item in items], claim.max_item_tokens)
        finally:
            watch.rest()
        self._rejects: list[Reject] = []
        if claim.options.on_long is OnLong.REJECT:
            self._rejects = [_too_long(items[at], claim) for at in np.flatnonzero(tokenised.truncated).tolist()]
            items = [item for item, cut in zip(items, tokenised.truncated, strict=True) if not cut]
            tokenised = tokenised.select(~tokenised.truncated)
        self._items, self._tokenised = items, tokenised
        self._vectors = np.zeros((len(items), encoder.dimensions), dtype=np.float32)
        self._made = np.zeros(len(items), dtype=np.bool_)
        self._tokens, self._truncated = tokenised.lengths.copy(), tokenised.truncated.copy()
        self._seconds = self._roofline_seconds = 0.0

    def commits(self) -> Iterator[Commit]:
        """Embed until all is done or the watch says stop, and yield the results so far at intervals. The rest is left
        to `last_commit`.

        Raises:
            GatewayChanged: the results since the last commit must not be written.
        """
        due = monotonic() + self._watch.commit_seconds
        self._watch.beat()
        try:
            for batch in self._encoder.batches(self._tokenised, lambda: self._watch.must_stop):
                self._watch.beat()
                self._add(batch)
                if monotonic() > due:
                    commit, bad = self._taken()
                    if _is_suspect(commit, bad):  # held back until it is known who is at fault
                        due = inf
                        continue
                    self._forget()
                    with self._watch.resting():
                        yield commit
                    due = monotonic() + self._watch.commit_seconds
        except GatewayChanged:
            raise
        except (GatewayBusy, GatewayRefused) as error:
            self._watch.interruption = error
        self._watch.rest()

    def last_commit(self) -> Commit:
        """Return the results that `commits` has left over.

        Raises:
            ModelError, GatewayChanged: an item failed and the canary fails too, so the items aren't at fault.
        """
        commit, bad = self._taken()
        if _is_suspect(commit, bad):
            try:
                self._encoder.prove_again()
            except GatewayChanged:
                raise
            except (GatewayBusy, GatewayRefused) as error:  # it can't be told now who is at fault
                self._watch.interruption, bad = error, []
        return replace(commit, rejects=[*commit.rejects, *bad])

    def _add(self, batch: Batch) -> None:
        instrumentation.ran(self._claim.model, batch)
        self._seconds += batch.seconds
        self._roofline_seconds += batch.roofline_seconds
        if batch.failure:
            self._rejects += [reject(self._items[at], *batch.failure) for at in batch.at.tolist()]
        else:
            self._vectors[batch.at], self._made[batch.at] = batch.vectors, True
            self._tokens[batch.at], self._truncated[list(batch.truncated)] = batch.tokens, True

    def _taken(self) -> tuple[Commit, list[Reject]]:
        """Return the results so far as a commit, and rejects for items whose vectors must not be written."""
        made, items = self._made, [item for item, done in zip(self._items, self._made, strict=True) if done]
        vectors = self._vectors[made]
        if vectors.shape[1] != self._claim.dimensions:
            vectors = shortened(vectors, self._claim.dimensions)
        rows = EmbeddedRows(
            indexes=np.array([item.index for item in items], dtype=np.int64),
            keys=[item.key for item in items],
            vectors=vectors,
            tokens=self._tokens[made],
            truncated=self._truncated[made],
            carried=[item.carried for item in items] if self._claim.carries else (),
        )
        rows, bad = split_bad_vectors(rows, self._claim.dimensions, self._claim.options.dtype)
        commit = Commit(
            rows=rows,
            rejects=self._rejects,
            device_seconds=self._seconds,
            roofline_seconds=self._roofline_seconds,
            device=self._encoder.device_kind,
            precision=self._encoder.precision,
        )
        return commit, bad

    def _forget(self) -> None:
        """Drop the results that have been handed over."""
        self._made[:] = False
        self._rejects, self._seconds, self._roofline_seconds = [], 0.0, 0.0


def _is_suspect(commit: Commit, bad: Sequence[Reject]) -> bool:
    """Return True if an item failed, by its own fault or the model's."""
    return bool(bad) or any(each.code is RejectCode.ENCODE_FAILED for each in commit.rejects)


def _too_long(item: Item, claim: Claim) -> Reject:
    return reject(item, RejectCode.TOO_LONG, f"more than {claim.max_item_tokens} tokens")


def reject(item: Item, code: RejectCode, message: str) -> Reject:
    return Reject(index=item.index, key=item.key, code=code, message=message)
