"""Loading of models with sentence-transformers."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

from pipeline.core.errors import ModelError

#: Settings of a bare transformer, which states none: plain text in, a vector for each token out.
_PLAIN: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def load(folder: Path, device: str, *, dtype: str = "float32", pooling: str | None = None) -> SentenceTransformer:
    """Load a model from `folder`; with `pooling`, a bare transformer to which that pooling is added.

    `dtype` (float32, bfloat16, float16) applies on CUDA only. Elsewhere, and in static models, half precision is
    widened to float32: there it is slower, or lets a text's vector change with its batch.

    Raises:
        ModelError: the model can't be loaded.
    """
    disable_progress_bar()
    # Let its warnings go through our own logs.
    disable_default_handler()
    enable_propagation()
    on_cuda = torch.device(device).type == "cuda"
    weights = {"use_safetensors": True, "torch_dtype": getattr(torch, dtype) if on_cuda else torch.float32}
    try:
        if pooling:
            model = SentenceTransformer(modules=_pooled(folder, weights, pooling), device=device, local_files_only=True)
        else:
            model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=weights
            )
    except Exception as error:  # a broken model may raise anything
        raise ModelError(f"{folder}: the model can't be loaded ({described(error)}).") from error
    if not on_cuda or isinstance(model[0], StaticEmbedding):
        model.float()
    return model.eval()


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
