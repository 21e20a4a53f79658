"""Encoding of a slice, and the commits that it yields."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import inf
from time import monotonic

import numpy as np
import numpy.typing as npt

from pipeline.chunk_io.commit import Commit, split_bad_vectors
from pipeline.core.chunks import Claim, Item, Reject, RejectCode
from pipeline.core.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.core.options import OnLong
from pipeline.core.vectors import shortened
from pipeline.db.embeddings import EmbeddedRows, Passages, passage_named
from workers import instrumentation
from workers.encoders.batching import LEAST_TOKENS, TOKENISED_AT_ONCE, Batch, Encoder, Tokenised, entitled, split_rule
from workers.watchdog import Watch

#: State of an item of which no more texts count.
_GONE = -(2**31)


class SliceEncoding:
    """Slice that is being encoded, with the results that aren't handed over yet.

    The encoder gets texts: those of the items, or their passages. An item's passages are handed over together.
    """

    def __init__(self, encoder: Encoder, claim: Claim, items: Sequence[Item], watch: Watch) -> None:
        self._encoder, self._claim, self._watch = encoder, claim, watch
        self._rejects: list[Reject] = []
        watch.beat()
        try:
            with instrumentation.step(claim.model, "tokenise"):
                texts = self._passages(items) if claim.options.splits else _whole(items)
                tokenised = _tokenised(encoder, texts, claim.max_item_tokens, watch)
        finally:
            watch.rest()
        if claim.options.on_long is OnLong.REJECT:
            self._rejects += [_too_long(items[at], claim) for at in np.flatnonzero(tokenised.truncated).tolist()]
            texts = _whole([item for item, cut in zip(items, tokenised.truncated, strict=True) if not cut])
            tokenised = tokenised.select(~tokenised.truncated)
        self._texts, self._tokenised = texts, tokenised
        self._vectors = np.zeros((len(texts.owner), encoder.dimensions), dtype=np.float32)
        self._made = np.zeros(len(texts.owner), dtype=np.bool_)
        #: Texts of each item that aren't embedded yet; below 0: it is rejected, or handed over.
        self._missing = np.bincount(texts.owner, minlength=len(texts.items))
        self._tokens, self._truncated = tokenised.lengths.copy(), tokenised.truncated.copy()
        self._seconds = self._roofline_seconds = 0.0

    def _passages(self, items: Sequence[Item]) -> "_Texts":
        """Return the passages of items; an item that can't have any is rejected."""
        rule = split_rule(self._claim.options, self._claim.max_item_tokens)
        found = self._encoder.split(
            [item.text for item in items], [item.title for item in items], rule, self._watch.beat
        )
        message = f"prompt and title leave fewer than {LEAST_TOKENS} of {rule.tokens:,} tokens for a passage"
        self._rejects = [
            reject(item, RejectCode.TOO_LONG, message) for item, spans in zip(items, found, strict=True) if not spans
        ]
        items, spans = [each for each, parts in zip(items, found, strict=True) if parts], list(filter(None, found))
        return _Texts(
            items=items,
            owner=np.repeat(np.arange(len(items)), [len(parts) for parts in spans]),
            passages=Passages(
                np.fromiter((at for parts in spans for at in range(len(parts))), np.int32),
                np.fromiter((start for parts in spans for start, _ in parts), np.int32),
                np.fromiter((stop for parts in spans for _, stop in parts), np.int32),
            ),
        )

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
                    if not (commit.settled or bad):  # no item has all its passages yet
                        due = monotonic() + self._watch.commit_seconds
                        continue
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
            self._fail(batch.at.tolist(), *batch.failure)
        else:
            self._vectors[batch.at], self._made[batch.at] = batch.vectors, True
            self._tokens[batch.at], self._truncated[list(batch.truncated)] = batch.tokens, True
            np.subtract.at(self._missing, self._texts.owner[batch.at], 1)
        self._watch.progressed = self._watch.progressed or bool((self._missing <= 0).any())

    def _fail(self, failed: Sequence[int], code: RejectCode, message: str) -> None:
        """Reject the items of texts that failed, each once."""
        for at in failed:
            owner = self._texts.owner[at]
            if self._missing[owner] >= 0:
                passage = self._texts.passages and passage_named(*(int(each[at]) for each in self._texts.passages))
                self._rejects.append(reject(self._texts.items[owner], code, f"{passage or ''}{message}"))
                self._missing[owner] = _GONE

    def _taken(self) -> tuple[Commit, list[Reject]]:
        """Return the results so far as a commit, and rejects for items whose vectors must not be written."""
        texts = self._texts
        # The order of items and passages, whatever the order of batches.
        made = np.flatnonzero(self._made & (self._missing[texts.owner] == 0))
        items = [texts.items[owner] for owner in texts.owner[made].tolist()]
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
            passages=texts.passages and Passages(*(column[made] for column in texts.passages)),
            lost_tokens=np.zeros(0, np.int64) if self._tokenised.lost is None else self._tokenised.lost[made],
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
        self._missing[self._missing == 0] = _GONE
        self._rejects, self._seconds, self._roofline_seconds = [], 0.0, 0.0


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts that the encoder gets, and the items that they are of."""

    items: Sequence[Item]
    #: Position of each text's item.
    owner: npt.NDArray[np.int64]
    #: `None`: each is the whole text of its item.
    passages: Passages | None = None


def _whole(items: Sequence[Item]) -> _Texts:
    return _Texts(items, np.arange(len(items)))


def _tokenised(encoder: Encoder, texts: _Texts, max_tokens: int | None, watch: Watch) -> Tokenised:
    """Tokenise texts; passages some at a time."""
    if texts.passages is None:
        return encoder.tokenise([item.text for item in texts.items], max_tokens)
    owned = zip(texts.owner.tolist(), texts.passages.start.tolist(), texts.passages.stop.tolist(), strict=True)
    parts = []
    while some := list(islice(owned, TOKENISED_AT_ONCE)):
        passages = ((texts.items[owner], start, stop) for owner, start, stop in some)
        read = [entitled(item.title, item.text[start:stop]) for item, start, stop in passages]
        parts.append(encoder.tokenise(read, max_tokens))
        watch.beat()
    if not parts:
        return encoder.tokenise([], max_tokens)
    return Tokenised(
        list(chain.from_iterable(part.ids for part in parts)),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.truncated for part in parts]),
        np.concatenate([part.lost for part in parts if part.lost is not None]),
    )


def _is_suspect(commit: Commit, bad: Sequence[Reject]) -> bool:
    """Return True if an item failed, by its own fault or the model's."""
    return bool(bad) or any(each.code is RejectCode.ENCODE_FAILED for each in commit.rejects)


def _too_long(item: Item, claim: Claim) -> Reject:
    return reject(item, RejectCode.TOO_LONG, f"more than {claim.max_item_tokens} tokens")


def reject(item: Item, code: RejectCode, message: str) -> Reject:
    return Reject(index=item.index, key=item.key, code=code, message=message)
