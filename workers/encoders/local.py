"""Encoder of a local model on a device: tokenises each text once, and embeds texts in token-budget batches."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import structlog
import torch

from pipeline.core.canary import CANARY, is_canary
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import ModelError
from workers.encoders import budget, library, packed, roofline, unpadded
from workers.encoders.batching import Batch, Span, SplitRule, Tokenised, token_batches
from workers.encoders.devices import kind_of
from workers.encoders.own_ids import OwnIds
from workers.encoders.reading import Ids, Way, ways_of
from workers.encoders.splitting import Splitter

log = structlog.get_logger()

_MOST_ITEMS = 2_048
#: Batches that must succeed at a shrunk token budget before it is doubled. If the device is too small for good, no more
#: than one pass in so many fails.
_PROVEN_BATCHES = 64
#: Forward passes in flight: a GPU runs one while the next one is made ready.
_MOST_RUNNING = {"cuda": 2}


class _Query(np.ndarray[tuple[int], np.dtype[np.int32]]):
    """Token ids of a query, if queries take another path through the model than documents."""


class _Pass(NamedTuple):
    """Forward pass in flight."""

    #: Positions of its texts.
    at: npt.NDArray[np.int64]
    since: float
    host: torch.Tensor
    #: Event after which `host` is filled; `None` if it is already.
    ready: torch.cuda.Event | None

    def vectors(self) -> npt.NDArray[np.float32]:
        """Wait for its vectors, and return them: float32 of shape (texts, dimensions)."""
        if self.ready:
            self.ready.synchronize()
        made: npt.NDArray[np.float32] = self.host.numpy()
        return made


class LocalEncoder:
    """Loaded model. One thread may tokenise while another one runs batches; no more at once."""

    def __init__(
        self,
        folder: Path,
        device: str,
        *,
        document_prompt: str = "",
        query_prompt: str = "",
        pooling: str | None = None,
        precision: str = "float32",
        threads: int | None = None,
    ) -> None:
        """Load weights from `folder`.

        `pooling` is for a bare transformer; `precision` is auto, float32, bfloat16 or float16, of which others than
        float32 apply on CUDA only; `threads` applies on the CPU only.

        Raises:
            ModelError: the weights can't be loaded, or the model can't be batched by token ids.
        """
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.device_kind = kind_of(device)
        self._model = library.load(folder, device, precision=precision, pooling=pooling)
        #: Precision in which it computes, whatever was asked for.
        self.precision = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        weights = (*self._model.parameters(), *self._model.buffers())
        #: Memory that the weights take.
        self.weights_bytes = sum(each.numel() * each.element_size() for each in weights)
        try:
            flop = roofline.flop_per_token(self._model)
            unpads = unpadded.unpad(self._model)
            if unpads and self.device.type == "cpu":
                packed.pack(self._model)
            self._documents, self._queries = ways_of(self._model, document_prompt, query_prompt, unpads=unpads)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
        #: Tokens per second at the device's rate of matrix products; 0 if the model multiplies nothing.
        self.roofline = self._roofline(flop)
        self._apart = not self._documents.goes_with(self._queries)
        self._expected = b""
        self._own_ids: OwnIds | None = None
        self._splitter: Splitter | None = None
        flat = self._documents.reader.flat and self._queries.reader.flat
        #: True if shorter texts of a batch are padded to its longest.
        self.pads = self._documents.reader.pads or self._queries.reader.pads
        self._most_running = _MOST_RUNNING.get(self.device.type, 1)
        self.budget_tokens = self._whole_budget_tokens = budget.starting_tokens(self._model, self.device, flat=flat)
        #: Batches until a shrunk budget is doubled; 0: it isn't shrunk.
        self._until_growth = 0
        self.max_item_tokens = self._documents.reader.max_tokens
        # Measured, since the size that a model states may be that of another part of it.
        self.dimensions = self._forward(self._documents.read([CANARY], None).ids).shape[1]

    @property
    def held_bytes(self) -> int:
        """Device memory that this process holds; on a CPU, the memory of the process."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.device))
        if self.device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return int(psutil.Process().memory_info().rss)

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None, *, queries: bool = False) -> Tokenised:
        """Tokenise `texts` as documents or as queries, truncated at `max_tokens` (default: the model's own limit)."""
        read = (self._queries if queries else self._documents).read(list(texts), max_tokens)
        if queries and self._apart:
            return Tokenised([ids.view(_Query) for ids in read.ids], read.lengths, read.truncated, read.lost)
        return read

    def split(
        self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule, beat: Callable[[], None] = lambda: None
    ) -> list[list[Span]]:
        """Return the passages of each document, none with more than `rule.tokens`. A text whose title leaves no room
        for passages has none. `beat` is called again and again meanwhile."""
        if self._splitter is None:
            reader = self._documents.reader
            self._splitter = Splitter(reader.tokenizer, self._documents.prompt, add_special_tokens=not reader.flat)
        return self._splitter.split(texts, titles, rule, beat)

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Embed every text in token-budget batches, longest first. No further one is begun once `stop` returns True.

        Running out of memory halves the token budget, which grows again as batches succeed. A batch that fails is
        bisected down to the text at fault, which comes back without a vector.
        """
        lengths = tokenised.lengths
        pending = [at for some in self._alike(tokenised.ids) for at in self._cut(some, lengths)][::-1]
        running: deque[_Pass] = deque()
        ended = perf_counter()
        while pending or running:
            tried = perf_counter()
            try:
                if pending and len(running) < self._most_running:
                    at = pending.pop()
                    if len(at) > 1 and self._size(lengths[at]) > self.budget_tokens:  # shrunk since it was cut
                        pending += self._cut(at, lengths)[::-1]
                        continue
                    running.append(self._begin(at, [tokenised.ids[n] for n in at]))
                    continue
                begun = running.popleft()
                at = begun.at
                vectors = begun.vectors()
            except Exception as error:  # noqa: BLE001 - one text may break the model in any way; the others go on
                if len(at) == 1:
                    why = _without_memory(error) or f"the model raised {type(error).__name__}"
                    failure = (RejectCode.ENCODE_FAILED, why)
                    yield Batch(at, lengths[at], perf_counter() - tried, failure=failure)
                    continue
                if _without_memory(error):
                    self._shrink(self._size(lengths[at]))
                half = len(at) // 2
                pending += [at[half:], at[:half]]
                continue
            size = self._size(lengths[at])
            self._grow(size)
            seconds, ended = perf_counter() - max(begun.since, ended), perf_counter()
            roofline_seconds = int(lengths[at].sum()) / self.roofline if self.roofline else 0.0
            yield Batch(at, lengths[at], seconds, vectors, padded_tokens=size, roofline_seconds=roofline_seconds)
            if stop():
                pending.clear()

    def _cut(self, at: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
        """Return the batches of the texts at these positions, longest texts first."""
        return [at[part] for part in token_batches(lengths[at], self.budget_tokens, _MOST_ITEMS, pads=self.pads)]

    def _roofline(self, flop: int) -> float:
        if not flop:
            return 0.0
        return roofline.flop_per_second(self.device, getattr(torch, self.precision)) / flop

    def _size(self, lengths: npt.NDArray[np.int32]) -> int:
        """Return a batch's tokens, with padding if the model pads."""
        return int(lengths.max()) * len(lengths) if self.pads else int(lengths.sum())

    def _alike(self, ids: Sequence[Any]) -> list[npt.NDArray[np.int64]]:
        """Return the positions of texts in groups that may share batches."""
        if not self._apart:
            return [np.arange(len(ids))]
        are_queries = np.fromiter((isinstance(one, _Query) for one in ids), np.bool_, len(ids))
        return [np.flatnonzero(~are_queries), np.flatnonzero(are_queries)]

    def _way_of(self, ids: Ids) -> Way:
        return self._queries if isinstance(ids, _Query) else self._documents

    def find_own_ids(self, ids: Mapping[int, list[int]]) -> int | None:
        """Return the position of token ids that are this model's own instead of OpenAI's, or None."""
        if self._own_ids is None:
            self._own_ids = OwnIds(self._documents.reader.tokenizer)
        return self._own_ids.find(ids)

    def encode(self, tokenised: Tokenised) -> npt.NDArray[np.float32]:
        """Return the vectors of all texts in order, as float32 of shape (texts, dimensions).

        Raises:
            ModelError: the model fails on one of the texts.
        """
        vectors = np.empty((len(tokenised.ids), self.dimensions), dtype=np.float32)
        for batch in self.batches(tokenised):
            if batch.vectors is None:
                raise ModelError(f"the model fails: {batch.failure}")
            vectors[batch.at] = batch.vectors
        return vectors

    def _shrink(self, failed_tokens: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget_tokens = max(1, min(self.budget_tokens, failed_tokens // 2))
        self._until_growth = _PROVEN_BATCHES
        log.warning("out_of_memory", device=str(self.device), budget_tokens=self.budget_tokens)

    def _grow(self, done_tokens: int) -> None:
        """Double a shrunk budget once enough batches that fill half of it have succeeded, up to the whole one."""
        if not self._until_growth or 2 * done_tokens < self.budget_tokens:
            return
        self._until_growth -= 1
        if self._until_growth:
            return
        self.budget_tokens = min(2 * self.budget_tokens, self._whole_budget_tokens)
        if self.budget_tokens < self._whole_budget_tokens:
            self._until_growth = _PROVEN_BATCHES
        log.info("token_budget_grown", device=str(self.device), budget_tokens=self.budget_tokens)

    def _begin(self, at: npt.NDArray[np.int64], ids: Sequence[Ids]) -> _Pass:
        """Begin a forward pass. On CUDA it runs on while the caller goes on."""
        since, vectors = perf_counter(), self._forward(ids)
        if not vectors.is_cuda:
            return _Pass(at, since, vectors.cpu(), None)
        host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Pass(at, since, host, ready)

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Ids]) -> torch.Tensor:
        way, on_cuda = self._way_of(ids[0]), self.device.type == "cuda"
        features = way.features(ids)
        for name, value in features.items():
            if isinstance(value, torch.Tensor):
                # From pinned memory the copy doesn't wait for the passes before it.
                features[name] = (value.pin_memory() if on_cuda else value).to(self.device, non_blocking=on_cuda)
        vectors: torch.Tensor = self._model(features, task=way.task)["sentence_embedding"]
        return vectors[:, : self._model.truncate_dim].float()

    def canary(self) -> npt.NDArray[np.float32]:
        """Return the canary text's vector."""
        return self.encode(self.tokenise([CANARY]))[0]

    def prove(self, expected: bytes) -> None:
        """Compare the canary's vector with the one in the catalogue, little-endian float32.

        Raises:
            ModelError: they differ: other weights, a broken driver or a broken device.
        """
        # Tokenised once: later another thread may be tokenising.
        self._canary, self._expected = self.tokenise([CANARY]), expected
        self.prove_again()

    def prove_again(self) -> None:
        """Repeat the last proof, to tell a bad text from a bad device.

        Raises:
            ModelError: the canary's vector is wrong by now.
        """
        if not is_canary(self.encode(self._canary)[0], self._expected):
            raise ModelError("the canary text's vector differs from the catalogue's: wrong weights or a broken device")


def _without_memory(error: Exception) -> str | None:
    lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
    return "the device ran out of memory on this text" if lacking else None
