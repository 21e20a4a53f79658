"""Dynamic batching for an engine: texts of many requests are queued together, and embedded in token-budget batches. One
thread runs the device; the event loop only hands texts over."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import structlog

from pipeline.core.errors import BadVector, ModelError, ModelsOwnTokens, ModelUnusable, UpstreamUnavailable
from pipeline.core.models import Model
from pipeline.core.openai import Embedded
from pipeline.core.vectors import sound
from pipeline.infra import metrics
from workers.encoders.batching import MOST_CHARACTERS_PER_TOKEN, Batch, Tokenised, passes
from workers.encoders.model_cache import ModelCache
from workers.engine.pace import Pace
from workers.engine.queue import DeviceQueue, QueuedRequest, Text, Work, seconds_ahead

if TYPE_CHECKING:
    from workers.encoders.local import LocalEncoder

log = structlog.get_logger()

#: Characters of a usual token, for texts that aren't tokenised yet.
_TOKEN_CHARACTERS = 4
#: Measured rate of the slower tokenisers.
_READ_CHARACTERS_PER_SECOND = 2_000_000
#: Characters that are tokenised at a time, before another request's turn.
_SLICE_CHARACTERS = 65_536
#: Share of a padded batch that may be padding; beyond it, another pass costs less.
_SPARE = 1 / 16
#: Pause before an unusable model is tried again.
_UNUSABLE_SECONDS = 60.0


class Batcher:
    """Dynamic batcher for the models on one device, used from an event loop.

    Args:
        model_cache: keeps the models.
        queue_seconds: longest time that a request may wait for others, at the models' rates on this device.
    """

    def __init__(self, model_cache: ModelCache, queue_seconds: float) -> None:
        self._model_cache, self._queue_seconds = model_cache, queue_seconds
        #: Work that is admitted and not answered yet.
        self._work: set[Work] = set()
        self._paces: dict[str, Pace] = {}
        metrics.ENGINE_WAITING_SECONDS.set_function(lambda: sum(map(self._seconds, list(self._work))))
        self._queues = DeviceQueue()
        #: Unusable models by name and weights: end of the pause, and reason.
        self._unusable: dict[tuple[str, str], tuple[float, str]] = {}
        self._changed = threading.Condition()
        self._stopped = False
        # Models are loaded, and texts tokenised, while the device runs.
        self._loading = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._device = threading.Thread(target=self._run, name="device", daemon=True)
        self._device.start()

    def stop(self) -> None:
        """End the threads. Waiting requests aren't answered."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._reader.shutdown(cancel_futures=True)
        self._device.join()

    def show(self) -> None:
        """Update the metrics of loaded models and device memory."""
        loaded = self._model_cache.encoders()
        metrics.ENGINE_MODELS_LOADED.set(len(loaded))
        for encoder in loaded:
            metrics.ENGINE_DEVICE_MEMORY_BYTES.labels(str(encoder.device)).set(encoder.held_bytes)

    def can_use(self, model: Model) -> bool:
        """Return True unless the model is marked unusable: it failed to load lately, or its canary came out wrong."""
        return self._why_unusable(model) is None

    def _why_unusable(self, model: Model) -> str | None:
        until, why = self._unusable.get(_identity(model), (0.0, ""))
        return why if time.monotonic() < until else None

    def _give_up(self, model: Model, error: Exception) -> ModelUnusable:
        log.error("model_unusable", model=model.name, reason=str(error))
        self._unusable[_identity(model)] = (time.monotonic() + _UNUSABLE_SECONDS, str(error))
        return ModelUnusable(str(error))

    async def load(self, model: Model) -> "LocalEncoder":
        """Return a model's encoder, which is loaded if it isn't yet.

        Raises:
            ModelUnusable: it can't be loaded here, or its canary comes out wrong.
        """
        # A model that was dropped isn't taken from the cache, even when its pause is over: it is loaded again.
        if _identity(model) not in self._unusable and (held := self._model_cache.held(model)):
            return held
        return await asyncio.wrap_future(self._load_apart(model))

    def load_now(self, model: Model) -> None:
        """Load a model as `load` does, before there is an event loop."""
        self._load_apart(model).result()

    def _load_apart(self, model: Model) -> "Future[LocalEncoder]":
        """Load a model in a thread that then ends. A thread that has run a model keeps its OpenMP threads, and beside
        them those of the device's thread wait in a slower way (7 % of its rate)."""
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        found = loader.submit(self._load, model)
        loader.shutdown(wait=False)
        return found

    def _load(self, model: Model) -> "LocalEncoder":
        if why := self._why_unusable(model):
            raise ModelUnusable(why)
        with self._loading:
            # A request that waited for a failed load gets the same error.
            if why := self._why_unusable(model):
                raise ModelUnusable(why)
            if self._unusable.pop(_identity(model), None):
                self._model_cache.drop(model.name)
            try:
                return self._model_cache.get(model)
            except Exception as error:
                raise self._give_up(model, error) from error

    async def embed(
        self,
        model: Model,
        texts: Sequence[str],
        *,
        queries: bool = False,
        token_ids: Mapping[int, list[int]] | None = None,
        caller: str = "",
    ) -> Embedded:
        """Return the vectors of texts, embedded as queries or as documents.

        `token_ids` holds, by position, the ids of texts that came as ids of OpenAI's tokens. Callers have equal shares
        of the device. A cancelled call gives up its place in the queue.

        Raises:
            UpstreamUnavailable: the request would wait too long.
            ModelUnusable: the model can't be loaded here, or its canary comes out wrong.
            ModelsOwnTokens: the ids are the model's own, not OpenAI's.
            BadVector: a text's vector is zero or not finite.
            ModelError: the model fails on these texts.
        """
        self._paces.setdefault(model.name, Pace(model.tokens_per_second))
        work = Work(caller, model.name, _estimated_tokens(texts, model), _reading_seconds(texts, model))
        self._let_in(work)
        try:
            return await self._embedded(model, texts, token_ids or {}, work, queries=queries)
        finally:
            self._work.discard(work)

    def _let_in(self, work: Work) -> None:
        waiting = ((other.caller, self._seconds(other)) for other in self._work)
        ahead = seconds_ahead(waiting, work.caller, self._seconds(work))
        if ahead > self._queue_seconds:
            metrics.ENGINE_REFUSED.inc()
            raise UpstreamUnavailable(
                f"{ahead:.0f} s of work is ahead of it; try again later.",
                retry_after_seconds=max(1.0, ahead - self._queue_seconds),
            )
        self._work.add(work)

    def _seconds(self, work: Work) -> float:
        return work.reading_seconds + self._paces[work.model].seconds(work.tokens)

    async def _embedded(
        self, model: Model, texts: Sequence[str], token_ids: Mapping[int, list[int]], work: Work, *, queries: bool
    ) -> Embedded:
        encoder = await self.load(model)
        if token_ids:
            looking = asyncio.get_running_loop().run_in_executor(self._reader, encoder.find_own_ids, token_ids)
            if (own := await looking) is not None:
                raise ModelsOwnTokens(own)
        tokenised = await self._read(encoder, texts, queries=queries)
        work.tokens, work.reading_seconds = float(tokenised.lengths.sum()), 0.0
        vectors = np.empty((len(texts), encoder.dimensions), np.float32)
        done = asyncio.get_running_loop().create_future()
        request = QueuedRequest(model, done, tokenised, vectors, len(texts), work)
        with self._changed:
            self._queues.add(encoder, request)
            self._changed.notify()
        try:
            return await request.done
        finally:
            request.dropped = True

    async def _read(self, encoder: "LocalEncoder", texts: Sequence[str], *, queries: bool) -> Tokenised:
        """Tokenise texts in slices, between which other requests have their turn."""
        loop = asyncio.get_running_loop()
        read = partial(encoder.tokenise, queries=queries)
        parts = [await loop.run_in_executor(self._reader, read, part) for part in _slices(texts)]
        if len(parts) == 1:
            return parts[0]
        return Tokenised(
            [ids for part in parts for ids in part.ids],
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.truncated for part in parts]),
        )

    def _run(self) -> None:
        """Run one turn after the other on the device, until stopped."""
        while turn := self._next():
            encoder, texts = turn
            try:
                failed = self._embed_turn(encoder, texts)
            except Exception as error:  # noqa: BLE001 - the device goes on for the others
                log.error("batch_failed", error=type(error).__name__)
                failed = [(text, ModelError("the model failed")) for text in texts]
            if failed:
                self._tell_failure(encoder, failed)

    def _next(self) -> "tuple[LocalEncoder, Sequence[Text]] | None":
        with self._changed:
            while not self._stopped:
                if turn := self._queues.take():
                    return turn
                self._changed.wait()
        return None

    def _embed_turn(self, encoder: "LocalEncoder", texts: Sequence[Text]) -> list[tuple[Text, Exception]]:
        """Embed texts. Return those that failed, each with its error."""
        failed: list[tuple[Text, Exception]] = []
        lengths = np.array([text.tokens for text in texts], np.int32)
        spare_tokens = int(encoder.budget_tokens * _SPARE)
        for at in passes(lengths, spare_tokens) if encoder.pads else [np.arange(len(texts))]:
            began = time.perf_counter()
            failed += self._forward(encoder, [texts[n] for n in at.tolist()])
            tokens = int(lengths[at].sum())
            self._paces[texts[0].request.model.name].learn(tokens, time.perf_counter() - began)
        return failed

    def _forward(self, encoder: "LocalEncoder", texts: Sequence[Text]) -> list[tuple[Text, Exception]]:
        """Embed texts, if padded then of about the same length. Return those that failed, each with its error."""
        failed: list[tuple[Text, Exception]] = []
        done: list[QueuedRequest] = []
        tokenised = Tokenised(
            [text.request.tokenised.ids[text.at] for text in texts],
            np.array([text.tokens for text in texts], np.int32),
            np.zeros(len(texts), np.bool_),
        )
        try:
            for batch in encoder.batches(tokenised):
                _count(texts[0].request.model.name, batch)
                good = sound(batch.vectors) if batch.vectors is not None else ()
                for row, n in enumerate(batch.at.tolist()):
                    text = texts[n]
                    if batch.vectors is None:
                        failed.append((text, ModelError(f"input[{text.at}]: {batch.failure and batch.failure[1]}")))
                        continue
                    if not good[row]:
                        failed.append((text, BadVector(text.at)))
                        continue
                    text.request.vectors[text.at] = batch.vectors[row]
                    text.request.work.tokens -= text.tokens
                    text.request.left -= 1
                    if not text.request.left:
                        done.append(text.request)
        finally:
            _answer([(request, None) for request in done])
        return failed

    def _tell_failure(self, encoder: "LocalEncoder", failed: list[tuple[Text, Exception]]) -> None:
        """Answer failed requests, after the canary has told if the texts or the model are at fault."""
        unusable = None
        try:
            encoder.prove_again()
        except Exception as error:  # noqa: BLE001 - a broken device may raise anything
            unusable = self._give_up(failed[0][0].request.model, error)
        _answer([(text.request, unusable or why) for text, why in failed])


def _count(model: str, batch: Batch) -> None:
    metrics.ENGINE_BATCH_SECONDS.labels(model).observe(batch.seconds)
    metrics.ENGINE_BATCHES.labels(model).inc()
    metrics.ENGINE_ITEMS.labels(model).inc(len(batch.at))
    metrics.ENGINE_TOKENS.labels(model).inc(int(batch.tokens.sum()))
    metrics.ENGINE_PADDED_TOKENS.labels(model).inc(batch.padded_tokens)


def _identity(model: Model) -> tuple[str, str]:
    return model.name, model.weights_sha256


def _estimated_tokens(texts: Sequence[str], model: Model) -> float:
    longest = model.max_item_tokens
    return sum(min(len(text) // _TOKEN_CHARACTERS + 1, longest or len(text) + 1) for text in texts)


def _reading_seconds(texts: Sequence[str], model: Model) -> float:
    """Estimate the seconds to tokenise texts. More of a long text is read than counts, to detect its truncation."""
    longest = model.max_item_tokens
    characters = sum(min(len(text), (longest or len(text)) * MOST_CHARACTERS_PER_TOKEN) for text in texts)
    return characters / _READ_CHARACTERS_PER_SECOND


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield consecutive texts in slices of at most `_SLICE_CHARACTERS`; a longer text is a slice of its own."""
    start = size = 0
    for at, text in enumerate(texts):
        if at > start and size + len(text) > _SLICE_CHARACTERS:
            yield texts[start:at]
            start, size = at, 0
        size += len(text)
    yield texts[start:]


def _answer(answers: Sequence[tuple[QueuedRequest, Exception | None]]) -> None:
    """Resolve requests from the device's thread. The event loop gets all of them in one call and does the rest, while
    the device goes on."""
    if not answers:
        return
    for request, _ in answers:
        request.dropped = True

    def tell() -> None:
        for request, error in answers:
            if request.done.done():
                continue
            if error:
                request.done.set_exception(error)
            else:
                request.done.set_result(_embedded(request))

    try:
        answers[0][0].done.get_loop().call_soon_threadsafe(tell)
    except RuntimeError:  # the loop has been closed meanwhile
        log.debug("nobody_waits")


def _embedded(request: QueuedRequest) -> Embedded:
    lengths, truncated = request.tokenised.lengths, request.tokenised.truncated
    return Embedded(
        vectors=request.vectors, prompt_tokens=int(lengths.sum()), truncated=np.flatnonzero(truncated).tolist()
    )
