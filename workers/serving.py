"""Dynamic batching for an engine: texts of many requests wait together, and go through their model in token-budget
batches. One thread runs the device; the event loop only hands texts over."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import structlog

from pipeline.errors import ModelError, UpstreamUnavailable
from pipeline.jobs import Model
from pipeline.wire import Embedded
from workers.batching import Tokenised, next_batch
from workers.residents import Residents

if TYPE_CHECKING:
    from workers.encoder import Encoder

log = structlog.get_logger()

#: Bytes of a usual token, for work that hasn't been read yet.
_TOKEN_BYTES = 4
_MOST_ITEMS = 2_048
#: Requests of less work than this are small.
_SMALL_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class _Request:
    """Texts that are answered together."""

    done: "asyncio.Future[Embedded]"
    tokenised: Tokenised
    vectors: npt.NDArray[np.float32]
    left: int
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    arrival: int
    request: _Request
    at: int

    @property
    def tokens(self) -> int:
        return int(self.request.tokenised.lengths[self.at])


@dataclass(eq=False, slots=True)
class _Lane:
    """What waits for one model."""

    encoder: "Encoder"
    texts: list[_Text] = field(default_factory=list)
    #: Whether the next batch is that of the oldest text; else that of the shortest.
    oldest: bool = True

    def take(self) -> list[_Text]:
        """The texts of the next batch."""
        self.texts = [text for text in self.texts if not text.request.dropped]
        if not self.texts:
            return []
        at = next_batch(
            np.fromiter((text.tokens for text in self.texts), np.int32, len(self.texts)),
            np.fromiter((text.arrival for text in self.texts), np.int64, len(self.texts)),
            self.encoder.budget_tokens,
            _MOST_ITEMS,
            oldest=self.oldest,
        )
        self.oldest = not self.oldest
        taken = set(at.tolist())
        batch = [self.texts[n] for n in at.tolist()]
        self.texts = [text for n, text in enumerate(self.texts) if n not in taken]
        return batch


class Serving:
    """Models on one device, for an event loop.

    Args:
        residents: keeps the models.
        queue_seconds: work that may wait, at the models' measured rates.
    """

    def __init__(self, residents: Residents, queue_seconds: float) -> None:
        self._residents, self._queue_seconds = residents, queue_seconds
        self._waiting_seconds = {"small": 0.0, "large": 0.0}
        self._in_flight = {"small": 0, "large": 0}
        self._arrivals = itertools.count()
        self._lanes: dict[str, _Lane] = {}
        self._changed = threading.Condition()
        self._stopped = False
        # Models are loaded, and texts read, beside the device.
        self._loading = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._device = threading.Thread(target=self._run, name="device", daemon=True)
        self._device.start()

    def stop(self) -> None:
        """End the threads; what waits isn't answered."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._reader.shutdown(cancel_futures=True)
        self._device.join()

    async def load(self, model: Model) -> "Encoder":
        """Have a model at hand.

        Raises:
            ModelError: it can't be loaded here.
        """
        if held := self._residents.held(model):
            return held
        return await asyncio.wrap_future(self._load_apart(model))

    def load_now(self, model: Model) -> None:
        """As `load`, before there is an event loop."""
        self._load_apart(model).result()

    def _load_apart(self, model: Model) -> "Future[Encoder]":
        """In a thread that ends: one that has run a model keeps its OpenMP threads, beside which those of the device's
        thread wait in a slower way (7 % of its rate)."""
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        found = loader.submit(self._load, model)
        loader.shutdown(wait=False)
        return found

    def _load(self, model: Model) -> "Encoder":
        with self._loading:
            return self._residents.get(model)

    async def embed(self, model: Model, texts: Sequence[str]) -> Embedded:
        """Vectors of texts, read as documents. A cancelled call gives its place in the queue up.

        Raises:
            UpstreamUnavailable: too much waits already.
            ModelError: the model can't be loaded here, or fails on these texts.
        """
        seconds = _tokens_of(texts, model.max_item_tokens) / model.tokens_per_second
        # Small requests don't wait for large ones, so these don't take their room either.
        kind = "small" if seconds < _SMALL_SECONDS else "large"
        waiting = self._waiting_seconds[kind]
        # One that alone is more than the queue should hold is let in when the queue is empty.
        if waiting and waiting + seconds > self._queue_seconds:
            raise UpstreamUnavailable(
                f"The queue holds {waiting:.0f} s of work; try again later.",
                retry_after_seconds=max(1.0, waiting / 2),
            )
        self._waiting_seconds[kind] += seconds
        self._in_flight[kind] += 1
        try:
            return await self._embedded(model, texts)
        finally:
            self._in_flight[kind] -= 1
            # Not by subtraction alone: what rounding leaves would count as waiting.
            self._waiting_seconds[kind] = self._waiting_seconds[kind] - seconds if self._in_flight[kind] else 0.0

    async def _embedded(self, model: Model, texts: Sequence[str]) -> Embedded:
        loop = asyncio.get_running_loop()
        encoder = await self.load(model)
        tokenised = await loop.run_in_executor(self._reader, encoder.tokenise, texts)
        vectors = np.empty((len(texts), encoder.dimensions), np.float32)
        request = _Request(loop.create_future(), tokenised, vectors, len(texts))
        with self._changed:
            lane = self._lanes.get(model.name)
            if lane is None or lane.encoder is not encoder:
                lane = self._lanes[model.name] = _Lane(encoder, lane.texts if lane else [])
            lane.texts += [_Text(next(self._arrivals), request, at) for at in range(len(texts))]
            self._changed.notify()
        try:
            return await request.done
        finally:
            request.dropped = True

    def _run(self) -> None:
        """Batches of each model in turn, until stopped."""
        while batch := self._next():
            lane, texts = batch
            try:
                self._forward(lane.encoder, texts)
            except Exception as error:  # noqa: BLE001 - the device goes on for the others
                log.error("batch_failed", error=type(error).__name__)
                for request in {text.request for text in texts}:
                    _answer(request, ModelError("the model failed"))

    def _next(self) -> tuple[_Lane, list[_Text]] | None:
        with self._changed:
            while not self._stopped:
                for name, lane in list(self._lanes.items()):
                    if texts := lane.take():
                        # To the end of the line of models.
                        self._lanes[name] = self._lanes.pop(name)
                        return lane, texts
                    del self._lanes[name]
                self._changed.wait()
        return None

    def _forward(self, encoder: "Encoder", texts: list[_Text]) -> None:
        tokenised = Tokenised(
            [text.request.tokenised.ids[text.at] for text in texts],
            np.array([text.tokens for text in texts], np.int32),
            np.zeros(len(texts), np.bool_),
        )
        for batch in encoder.batches(tokenised):
            for row, n in enumerate(batch.at.tolist()):
                text = texts[n]
                if batch.vectors is None or not np.isfinite(batch.vectors[row]).all():
                    why = batch.failure[1] if batch.failure else "its vector is not finite"
                    _answer(text.request, ModelError(f"input[{text.at}]: {why}"))
                    continue
                text.request.vectors[text.at] = batch.vectors[row]
                text.request.left -= 1
                if not text.request.left:
                    _answer(text.request, None)


def _tokens_of(texts: Sequence[str], longest: int | None) -> int:
    """About how many tokens a model reads of texts."""
    return sum(min(len(text) // _TOKEN_BYTES + 1, longest or len(text) + 1) for text in texts)


def _answer(request: _Request, error: ModelError | None) -> None:
    """From the device's thread: a request is done, or has failed."""
    request.dropped = True
    lengths, truncated = request.tokenised.lengths, request.tokenised.truncated
    cut = np.flatnonzero(truncated).tolist()
    found = Embedded(vectors=request.vectors, prompt_tokens=int(lengths.sum()), truncated=cut)

    def tell() -> None:
        if request.done.done():
            return
        if error:
            request.done.set_exception(error)
        else:
            request.done.set_result(found)

    _call(request.done.get_loop().call_soon_threadsafe, tell)


def _call(soon: Callable[[Callable[[], None]], object], tell: Callable[[], None]) -> None:
    try:
        soon(tell)
    except RuntimeError:  # the loop has been closed meanwhile
        log.debug("nobody_waits")
