"""Memory: the token budget that a model begins with, shrinks to and grows back to, and room for weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.catalog.models import from_portable, weights_bytes
from pipeline.core.models import Model
from pipeline.core.options import Precision
from tests.support.tiny_models import KINDS
from workers.encoders import budget, library, local
from workers.encoders.local import LocalEncoder
from workers.encoders.model_cache import Loader, ModelCache
from workers.encoders.weights import weights_elements

CUDA = torch.device("cuda")
GIB = 2**30
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 64


@pytest.fixture
def tiny(tmp_path: Path) -> LocalEncoder:
    (kind,) = (each for each in KINDS if each.name == "BERT, mean")
    kind.make(tmp_path / "model")
    return LocalEncoder(tmp_path / "model", "cpu")


class SmallDevice:
    """Device of an encoder that runs out of memory beyond some tokens."""

    def __init__(self, encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch, most_tokens: float) -> None:
        self.most_tokens = most_tokens
        self.sizes: list[int] = []
        self.failed = 0
        forward = encoder._forward

        def run(ids: Sequence[list[int]]) -> Any:
            size = sum(map(len, ids))
            if size > self.most_tokens:
                self.failed += 1
                raise torch.OutOfMemoryError("out of memory")
            self.sizes.append(size)
            return forward(ids)

        monkeypatch.setattr(encoder, "_forward", run)


def test_the_budget_grows_back_when_memory_is_free_again(tiny: LocalEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tokenised = tiny.budget_tokens, tiny.tokenise(TEXTS * 16)
    expected = tiny.encode(tokenised)
    device = SmallDevice(tiny, monkeypatch, whole / 8)
    assert np.abs(tiny.encode(tokenised) - expected).max() < 1e-5
    shrunk = tiny.budget_tokens
    assert whole / 32 <= shrunk <= whole / 8
    device.most_tokens, device.sizes = float("inf"), []
    budgets = []
    while tiny.budget_tokens < whole:
        assert np.abs(tiny.encode(tokenised) - expected).max() < 1e-5
        budgets.append(tiny.budget_tokens)
    assert budgets == sorted(budgets)
    assert budgets[-1] == whole, "and not beyond it"
    assert len(device.sizes) >= local._PROVEN_BATCHES * np.log2(whole / shrunk)
    device.sizes = []
    tiny.encode(tokenised)
    assert max(device.sizes) > whole / 2


def test_a_device_that_stays_small_is_seldom_tried(tiny: LocalEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(tiny, monkeypatch, tiny.budget_tokens / 4)
    tokenised = tiny.tokenise(TEXTS * 16)
    tiny.encode(tokenised)
    device.failed, device.sizes = 0, []
    for _ in range(20):
        tiny.encode(tokenised)
    assert 0 < device.failed <= len(device.sizes) / local._PROVEN_BATCHES + 2


def test_batches_that_leave_memory_unused_prove_nothing(tiny: LocalEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallDevice(tiny, monkeypatch, tiny.budget_tokens / 4)
    tiny.encode(tiny.tokenise(TEXTS * 16))
    shrunk, one = tiny.budget_tokens, tiny.tokenise(TEXTS[:1])
    for _ in range(3 * local._PROVEN_BATCHES):
        tiny.encode(one)
    assert tiny.budget_tokens == shrunk


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the memory of a GPU that isn't there."""

    def set_memory(free: int, *, reserved: int = 0, allocated: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 141 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)

    return set_memory


def test_a_gpu_begins_with_what_its_free_memory_takes(bundled_model: Path, on_cuda: Callable[..., None]) -> None:
    model = library.load(bundled_model, "cpu")
    token = (8 * 384 + 3 * 1_536) * 4
    assert budget.activation_bytes(model[0].model) == token

    def begins_with() -> int:
        return budget.starting_tokens(model, CUDA, flat=False)

    on_cuda(140 * GIB)
    assert begins_with() == 65_536
    on_cuda(2 * GIB)
    assert begins_with() == GIB // 2 // token == 17_476
    on_cuda(GIB, reserved=3 * GIB, allocated=2 * GIB)
    assert begins_with() == 17_476, "what torch holds unused is free"
    on_cuda(0)
    assert begins_with() == 1_024
    model[0].model.bfloat16()
    on_cuda(2 * GIB)
    assert begins_with() == 2 * 17_476


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.refused], ids=lambda kind: kind.name)
def test_every_kind_of_model_has_a_budget(kind: Any, tmp_path: Path, on_cuda: Callable[..., None]) -> None:
    kind.make(tmp_path / "model")
    model = library.load(tmp_path / "model", "cpu", pooling=kind.pooling)
    on_cuda(GIB)
    flat = kind.name.startswith("static")
    assert budget.starting_tokens(model, CUDA, flat=flat) == (131_072 if flat else 65_536)


def cached_model(description: dict[str, Any]) -> Model:
    columns = {name: value for name, value in description.items() if name not in ("notes", "device")}
    return from_portable({**columns, "name": "minilm", "slug": "minilm", "upstream": None})


def test_weights_count_as_they_are_loaded(
    bundled_model: Path, bundled_description: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cached_model(bundled_description)
    file = weights_bytes(bundled_model)
    elements = weights_elements(bundled_model)
    assert 4 * elements == pytest.approx(file, rel=0.01)
    assert Loader("cpu", None, "auto").weights_bytes(model) == 4 * elements
    whole = LocalEncoder(bundled_model, "cpu")
    monkeypatch.setattr(library, "dtype_on", lambda *_: torch.bfloat16)
    assert Loader("cpu", None, "auto").weights_bytes(model) == 2 * elements
    half = LocalEncoder(bundled_model, "cpu")
    assert whole.weights_bytes == pytest.approx(4 * elements, rel=0.01)
    assert half.weights_bytes == pytest.approx(2 * elements, rel=0.01)


def test_half_precision_is_counted_whole_where_it_is_widened(tmp_path: Path) -> None:
    (kind,) = (each for each in KINDS if each.name == "static in float16, Normalize")
    kind.make(tmp_path / "model")
    encoder = LocalEncoder(tmp_path / "model", "cpu")
    assert encoder.weights_bytes == 4 * weights_elements(tmp_path / "model")
    assert encoder.weights_bytes == pytest.approx(2 * weights_bytes(tmp_path / "model"), rel=0.01)


@pytest.mark.parametrize(("room_for", "kept"), [(4 + 2, 2), (4 + 1, 1)])
def test_models_are_evicted_by_the_memory_that_they_take(
    bundled_description: dict[str, Any], monkeypatch: pytest.MonkeyPatch, room_for: int, kept: int
) -> None:
    """Weights in float32 and in bfloat16 take six bytes an element; there is room for as much again."""

    def dtype_on(_: torch.device, precision: str) -> torch.dtype:
        return torch.bfloat16 if precision == "auto" else torch.float32

    monkeypatch.setattr(library, "dtype_on", dtype_on)
    model = cached_model(bundled_description)
    bytes_each = Loader("cpu", None, "auto").weights_bytes(model) / 2
    cache = ModelCache(Loader("cpu", None, "auto"), int(2 * room_for * bytes_each * 1.01))
    usual = cache.get(model)
    demanded = cache.get(model, Precision.FLOAT32)
    assert cache.encoders() == [usual, demanded][-kept:]
