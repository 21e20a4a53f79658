"""Loading of models with sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

from pipeline.core.errors import ModelError

#: Settings of a bare transformer, which states none: plain text in, a vector for each token out.
_PLAIN: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def dtype_on(device: torch.device, precision: str) -> torch.dtype:
    """Return the type in which a transformer computes on a device, asked for auto, float32, bfloat16 or float16.

    `auto` is bfloat16 where a CUDA device computes in it (from compute capability 8.0 on), else float32. Other types
    than float32 apply on CUDA only: elsewhere they are slower.
    """
    if device.type != "cuda":
        return torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    asked: torch.dtype = getattr(torch, precision)
    return asked


def dtype_of(folder: Path, device: str, precision: str) -> torch.dtype:
    """Return the type in which a model is loaded. Static models and routers are always in float32: in half precision a
    text's static vector would change with its batch, and a router's parts would differ in type."""
    return dtype_on(torch.device(device), precision) if _begins_with_transformer(folder) else torch.float32


def load(folder: Path, device: str, *, precision: str = "float32", pooling: str | None = None) -> SentenceTransformer:
    """Load a model from `folder`; with `pooling`, a bare transformer to which that pooling is added.

    `precision` is auto, float32, bfloat16 or float16; see `dtype_of`.

    Raises:
        ModelError: the model can't be loaded.
    """
    disable_progress_bar()
    # Let its warnings go through our own logs.
    disable_default_handler()
    enable_propagation()
    try:
        dtype = dtype_of(folder, device, precision)
        weights = {"use_safetensors": True, "torch_dtype": dtype}
        if pooling:
            model = SentenceTransformer(modules=_pooled(folder, weights, pooling), device=device, local_files_only=True)
        else:
            model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=weights
            )
    except Exception as error:  # a broken model may raise anything
        raise ModelError(f"{folder}: the model can't be loaded ({described(error)}).") from error
    if dtype == torch.float32:
        model.float()
    return model.eval()


def _begins_with_transformer(folder: Path) -> bool:
    """Return True if a model's first module is a transformer, as it is in a folder without modules."""
    try:
        first = json.loads((folder / "modules.json").read_bytes())[0]
    except FileNotFoundError:
        return True
    return bool(first["type"].rsplit(".", 1)[-1] == "Transformer")


def _pooled(folder: Path, weights: dict[str, Any], pooling: str) -> list[torch.nn.Module]:
    local = {"local_files_only": True, "trust_remote_code": False}
    transformer = Transformer(
        str(folder),
        model_kwargs={**local, **weights},
        processor_kwargs=dict(local),
        config_kwargs=dict(local),
        **_PLAIN,
    )
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]


def described(error: Exception) -> str:
    """Return a library's error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
