"""LRU cache of the models that a process keeps loaded while memory lasts."""

import gc
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from pipeline.core.errors import ModelError
from pipeline.core.models import Model
from pipeline.infra.settings import ROOM_FACTOR
from workers.encoders.weights import verified_folder

if TYPE_CHECKING:  # the parent and Flower import this module, and need no torch
    from workers.encoders.local import LocalEncoder

log = structlog.get_logger()


class ModelCache:
    """LRU cache of loaded models. `load` makes an encoder of a catalogue entry; `memory_bytes` limits all together."""

    def __init__(self, load: Callable[[Model], "LocalEncoder"], memory_bytes: int) -> None:
        self._load = load
        self._memory_bytes = memory_bytes
        self._loaded: OrderedDict[str, tuple[Model, LocalEncoder]] = OrderedDict()

    def get(self, model: Model) -> "LocalEncoder":
        """Return the encoder of a model, loaded and checked by its canary on first use.

        Raises:
            ModelError: the model can't be loaded here, or isn't the catalogue's.
        """
        if held := self.held(model):
            return held
        self._loaded.pop(model.name, None)
        self._make_room(model.weights_bytes)
        try:
            encoder = self._load(model)
            encoder.prove(model.canary)
        except ModelError:
            raise
        except Exception as error:  # a library that is missing, a folder that can't be read: no text is to blame
            raise ModelError(f"it can't be loaded here ({type(error).__name__}: {str(error)[:300]})") from error
        self._loaded[model.name] = (model, encoder)
        log.info("model_loaded", model=model.name, device=str(encoder.device), precision=encoder.precision)
        return encoder

    def held(self, model: Model) -> "LocalEncoder | None":
        """Return the encoder of a model if it is loaded. Safe in another thread than the one that loads."""
        held = self._loaded.get(model.name)
        if held is None or held[0].weights_sha256 != model.weights_sha256:
            return None
        with suppress(KeyError):  # evicted just now
            self._loaded.move_to_end(model.name)
        return held[1]

    def encoders(self) -> "list[LocalEncoder]":
        """Return the encoders that are loaded."""
        return [encoder for _, encoder in list(self._loaded.values())]

    def drop(self, name: str) -> None:
        """Remove a model from the cache."""
        self._loaded.pop(name, None)
        gc.collect()

    def _make_room(self, weights_bytes: int) -> None:
        def taken() -> int:
            return sum(model.weights_bytes for model, _ in list(self._loaded.values())) * ROOM_FACTOR

        while self._loaded and taken() + weights_bytes * ROOM_FACTOR > self._memory_bytes:
            name, _ = self._loaded.popitem(last=False)
            log.info("model_evicted", model=name)
        gc.collect()


def loader(device: str, threads: int | None, precision: str) -> Callable[[Model], "LocalEncoder"]:
    """Return a function that makes encoders on `device`, from verified weights and with the catalogue's prompts.

    `precision` is auto, float32, bfloat16 or float16. If a model or the device doesn't take one that is named, the log
    says so.
    """

    def load(model: Model) -> "LocalEncoder":
        from workers.encoders.local import LocalEncoder

        folder = verified_folder(model)
        encoder = LocalEncoder(
            folder,
            device,
            document_prompt=model.document_prompt,
            query_prompt=model.query_prompt,
            pooling=model.pooling,
            precision=precision,
            threads=threads,
        )
        if precision not in ("auto", encoder.precision):
            log.warning(
                "precision_not_applied", model=model.name, device=device, asked=precision, used=encoder.precision
            )
        return encoder

    return load
