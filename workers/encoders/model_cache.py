"""LRU cache of the models that a process keeps loaded while memory lasts."""

import gc
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from pipeline.core.errors import ModelError
from pipeline.core.models import Model
from pipeline.core.options import Precision
from pipeline.infra.settings import ROOM_FACTOR
from workers.encoders.imports import import_library
from workers.encoders.weights import folder_of, verified_folder, weights_elements

if TYPE_CHECKING:  # the parent and Flower import this module, and need no torch
    from workers.encoders.local import LocalEncoder

log = structlog.get_logger()


class Loader:
    """Loader of models on one device, from verified weights and with the catalogue's prompts.

    Args:
        device: cpu, mps, cuda:0 and so on.
        threads: on a CPU, the threads that it computes with.
        precision: auto, float32, bfloat16 or float16, where a job demands none. If the device or a model isn't computed
            in one that is named, the log says so.
    """

    def __init__(self, device: str, threads: int | None, precision: str) -> None:
        self._device, self._threads, self._precision = device, threads, precision

    def weights_bytes(self, model: Model, precision: Precision = Precision.AUTO) -> int:
        """Return the memory that a model's weights will take, in the type that it is loaded in.

        Raises:
            ModelError: its folder isn't here, or damaged.
        """
        import_library()
        from workers.encoders.library import dtype_of

        folder = folder_of(model)
        return weights_elements(folder) * dtype_of(folder, self._device, self._asked(precision)).itemsize

    def _asked(self, precision: Precision) -> str:
        return self._precision if precision is Precision.AUTO else precision.value

    def load(self, model: Model, precision: Precision = Precision.AUTO) -> "LocalEncoder":
        """Return an encoder of a catalogue entry, in the precision that a job demands.

        Raises:
            ModelError: the model can't be loaded here, or isn't the catalogue's.
        """
        import_library()
        from workers.encoders.local import LocalEncoder

        asked = self._asked(precision)
        encoder = LocalEncoder(
            verified_folder(model),
            self._device,
            document_prompt=model.document_prompt,
            query_prompt=model.query_prompt,
            pooling=model.pooling,
            precision=asked,
            threads=self._threads,
        )
        if asked not in ("auto", encoder.precision):
            log.warning(
                "precision_not_applied", model=model.name, device=self._device, asked=asked, used=encoder.precision
            )
        return encoder


class ModelCache:
    """LRU cache of loaded models, by name and demanded precision. `memory_bytes` limits all together."""

    def __init__(self, loader: Loader, memory_bytes: int) -> None:
        self._loader = loader
        self._memory_bytes = memory_bytes
        self._loaded: OrderedDict[tuple[str, Precision], tuple[Model, LocalEncoder]] = OrderedDict()

    def get(self, model: Model, precision: Precision = Precision.AUTO) -> "LocalEncoder":
        """Return the encoder of a model, loaded and checked by its canary on first use.

        Raises:
            ModelError: the model can't be loaded here, or isn't the catalogue's.
        """
        if held := self.held(model, precision):
            return held
        self._loaded.pop((model.name, precision), None)
        try:
            self._make_room(self._loader.weights_bytes(model, precision))
            encoder = self._loader.load(model, precision)
            encoder.prove(model.canary)
        except ModelError:
            raise
        except Exception as error:  # a library that is missing, a folder that can't be read: no text is to blame
            raise ModelError(f"it can't be loaded here ({type(error).__name__}: {str(error)[:300]})") from error
        self._loaded[model.name, precision] = (model, encoder)
        log.info("model_loaded", model=model.name, device=str(encoder.device), precision=encoder.precision)
        return encoder

    def held(self, model: Model, precision: Precision = Precision.AUTO) -> "LocalEncoder | None":
        """Return the encoder of a model if it is loaded. Safe in another thread than the one that loads."""
        for loaded_for in Precision:
            held = self._loaded.get((model.name, loaded_for))
            if held is None or held[0].weights_sha256 != model.weights_sha256:
                continue
            if loaded_for is precision or _serves_both(held[1], precision):
                with suppress(KeyError):  # evicted just now
                    self._loaded.move_to_end((model.name, loaded_for))
                return held[1]
        return None

    def encoders(self) -> "list[LocalEncoder]":
        """Return the encoders that are loaded."""
        return [encoder for _, encoder in list(self._loaded.values())]

    def drop(self, name: str) -> None:
        """Remove a model from the cache."""
        for precision in Precision:
            self._loaded.pop((name, precision), None)
        gc.collect()

    def _make_room(self, weights_bytes: int) -> None:
        while self._loaded:
            taken = sum(encoder.weights_bytes for encoder in self.encoders())
            if (taken + weights_bytes) * ROOM_FACTOR <= self._memory_bytes:
                break
            (name, _), _ = self._loaded.popitem(last=False)
            log.info("model_evicted", model=name)
        gc.collect()


def _serves_both(encoder: "LocalEncoder", precision: Precision) -> bool:
    """Return True if an encoder that was loaded for the other precision serves this one, too: a demand for float32 if
    it is in that, and any if its device knows no other."""
    is_whole = encoder.precision == Precision.FLOAT32
    return is_whole and (precision is Precision.FLOAT32 or encoder.device.type != "cuda")
