"""Half precision: computed on a CPU, since tests have no GPU, by models of every kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from pipeline.catalog.models import from_portable
from pipeline.core.canary import cosine
from pipeline.core.models import Model
from pipeline.core.options import Precision
from pipeline.infra.settings import load_settings
from tests.support.tiny_models import KINDS, Kind
from workers.encoders import devices, library
from workers.encoders.local import LocalEncoder
from workers.encoders.model_cache import Loader, ModelCache

#: Kinds whose vectors would change with their batch, or whose parts would differ in type.
_WIDENED = ("static", "Router: ")


def make_gpu_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU compute in bfloat16 unless another precision is named."""

    def dtype_on(_: torch.device, precision: str) -> torch.dtype:
        return torch.bfloat16 if precision == "auto" else getattr(torch, precision)

    monkeypatch.setattr(library, "dtype_on", dtype_on)


def compute_in(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(library, "dtype_on", lambda *_: dtype)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "found"),
    [
        ("cpu", None, "auto", torch.float32),
        ("cpu", None, "bfloat16", torch.float32),
        ("mps", None, "auto", torch.float32),
        ("mps", None, "float16", torch.float32),
        ("cuda:0", (7, 5), "auto", torch.float32),
        ("cuda:0", (8, 0), "auto", torch.bfloat16),
        ("cuda:0", (9, 0), "auto", torch.bfloat16),
        ("cuda:0", (9, 0), "float32", torch.float32),
        ("cuda:0", (7, 5), "float16", torch.float16),
    ],
)
def test_precision_by_device(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: Any, precision: str, found: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert library.dtype_on(torch.device(device), precision) == found


def test_auto_is_the_default() -> None:
    assert load_settings().worker_dtype == "auto"


def test_an_encoder_tells_its_precision_and_device(bundled_model: Path) -> None:
    encoder = LocalEncoder(bundled_model, "cpu", precision="auto")
    assert (encoder.precision, encoder.device_kind) == ("float32", "cpu")


def test_a_cuda_devices_kind_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: {"cuda:1": "NVIDIA H200, of some kind"}[name])
    assert devices.kind_of("cuda:1") == "NVIDIA H200  of some kind", "settings list kinds with commas"
    assert devices.kind_of("mps") == "mps"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_canary_of_the_catalogue_comes_out(
    bundled_model: Path, bundled_description: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    compute_in(monkeypatch, dtype)
    encoder = LocalEncoder(bundled_model, "cpu", precision="auto")
    assert encoder.precision == str(dtype).removeprefix("torch.")
    encoder.prove(bytes.fromhex(bundled_description["canary"]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.refused], ids=lambda kind: kind.name)
def test_half_precision_moves_no_vector_far(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    kind.make(tmp_path / "model")
    whole = LocalEncoder(tmp_path / "model", "cpu", pooling=kind.pooling)
    compute_in(monkeypatch, torch.bfloat16)
    half = LocalEncoder(tmp_path / "model", "cpu", pooling=kind.pooling, precision="auto")
    for module in half._model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert str(module.weight.dtype) == f"torch.{half.precision}"
    is_widened = kind.name.startswith(_WIDENED)
    assert (whole.precision, half.precision) == ("float32", "float32" if is_widened else "bfloat16")
    texts = ["The quick brown fox", "miller", " ".join(f"the miller's daughter {n}" for n in range(90))]
    for queries in (False, True):
        expected, found = (each.encode(each.tokenise(texts, queries=queries)) for each in (whole, half))
        # A canary at a cosine of 0.99 passes.
        assert min(cosine(mine, other) for mine, other in zip(found, expected, strict=True)) > 0.999


@pytest.mark.parametrize(("asked", "told"), [("auto", []), ("float32", []), ("bfloat16", ["bfloat16"])])
def test_a_precision_that_is_not_applied_is_said(
    static_description: dict[str, Any], asked: str, told: list[str]
) -> None:
    columns = {name: value for name, value in static_description.items() if name not in ("notes", "device")}
    model = from_portable({**columns, "name": "static", "slug": "static", "upstream": None})
    with capture_logs() as logs:
        encoder = Loader("cpu", None, asked).load(model)
    said = [each for each in logs if each["event"] == "precision_not_applied"]
    assert [each["asked"] for each in said] == told
    assert encoder.precision == "float32"


def cached_model(bundled_description: dict[str, Any]) -> Model:
    columns = {name: value for name, value in bundled_description.items() if name not in ("notes", "device")}
    return from_portable({**columns, "name": "minilm", "slug": "minilm", "upstream": None})


def test_a_model_is_kept_in_each_precision_that_jobs_demand(
    bundled_description: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpu_of_cpu(monkeypatch)
    model = cached_model(bundled_description)
    cache = ModelCache(Loader("cpu", None, "auto"), 2**40)
    usual = cache.get(model)
    assert cache.held(model, Precision.FLOAT32) is None, "a demand isn't met by half precision"
    demanded = cache.get(model, Precision.FLOAT32)
    assert (usual.precision, demanded.precision) == ("bfloat16", "float32")
    assert [cache.get(model), cache.get(model, Precision.FLOAT32)] == [usual, demanded]
    cache.drop(model.name)
    assert cache.encoders() == []


@pytest.mark.parametrize("first", Precision)
def test_one_copy_serves_all_jobs_where_there_is_one_precision(
    bundled_description: dict[str, Any], first: Precision
) -> None:
    model = cached_model(bundled_description)
    cache = ModelCache(Loader("cpu", None, "auto"), 2**40)
    loaded = cache.get(model, first)
    assert [cache.get(model, each) for each in Precision] == [loaded, loaded]


def test_on_a_gpu_that_computes_in_float32_a_demand_is_met_by_the_usual_copy(
    bundled_description: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cached_model(bundled_description)
    cache = ModelCache(Loader("cpu", None, "float32"), 2**40)
    usual = cache.get(model)
    monkeypatch.setattr(usual, "device", torch.device("cuda"))
    assert cache.held(model, Precision.FLOAT32) is usual
