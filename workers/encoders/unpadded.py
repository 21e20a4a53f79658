"""Forward pass over texts of different lengths behind each other in one sequence, without padding.

Attention and pooling are told where each text begins, by the names that sentence-transformers and transformers have
for it. On CUDA in half precision attention is torch's kernel for variable lengths; elsewhere texts of one length are
taken together.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

_NAME = "vectormill_unpadded"
#: Architectures in which tokens meet in plain attention only, and positions can be given; each is tested.
_FITTING = {"bert", "distilbert", "qwen2", "qwen3", "roberta", "xlm-roberta"}
_AFTER = (Pooling, Dense, Normalize)


def unpad(model: SentenceTransformer) -> bool:
    """Let a model take unpadded features, if its architecture fits. Return True if it does."""
    first, *others = model
    if type(first) is not Transformer or not all(isinstance(module, _AFTER) for module in others):
        return False
    config = first.model.config
    if config.model_type not in _FITTING or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return False
    if not _pays(first.model):
        return False
    first.model.set_attn_implementation(_NAME)
    if first.model_forward_params is not None:
        first.model_forward_params |= {"cu_seq_lens_q", "max_length_q"}
    return True


def _pays(model: Any) -> bool:
    """Return True if attention within each text is fast where the model is: on a CPU, or by the kernel."""
    weight = next(model.parameters())
    if weight.is_cuda:
        heads = model.config.num_attention_heads
        size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
        has_kernel = torch.cuda.get_device_capability(weight.device) >= (8, 0) and size % 8 == 0 and size <= 256
        return has_kernel and weight.dtype in (torch.float16, torch.bfloat16)
    return weight.device.type == "cpu"


def padding_of(transformer: Transformer) -> int | None:
    """Return the padding's id where positions are counted from behind it, as RoBERTa and its kin do, else None."""
    for module in transformer.model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return padding
    return None


def features(ids: Sequence[npt.NDArray[np.int32]], padding: int | None) -> dict[str, Any]:
    """Return the arguments of a forward pass over texts' token ids. `padding` is what `padding_of` returns.

    Raises:
        ValueError: a text has no tokens, so that pooling would take its neighbour's.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    if not lengths.all():
        raise ValueError("a text has no tokens")
    flat = np.concatenate(ids, dtype=np.int64)
    starts = np.append(0, np.cumsum(lengths))
    if padding is None:
        positions = np.arange(len(flat)) - np.repeat(starts[:-1], lengths)
    else:  # a padding's mark within a text isn't counted
        counts = flat != padding
        before = np.append(0, np.cumsum(counts))
        positions = (before[1:] - np.repeat(before[starts[:-1]], lengths)) * counts + padding
    return {
        "input_ids": torch.from_numpy(flat).unsqueeze(0),
        "position_ids": torch.from_numpy(positions).unsqueeze(0),
        "cu_seq_lens_q": torch.from_numpy(starts.astype(np.int32)),
        "max_length_q": int(lengths.max()),
    }


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001 - transformers' signature
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text. `query`, `key`, `value`: (1, heads, tokens, size) → (1, tokens, heads, size)."""
    causal = bool(module.is_causal if is_causal is None else is_causal)
    attend = _attend_by_kernel if query.is_cuda and query.dtype != torch.float32 else _attend_by_length
    return attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal=causal), None


def _attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    *,
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    window = (-1, 0 if causal else -1)
    # Not always given, since torch 2.11 has no such argument.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    made: torch.Tensor = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, **grouped
    )
    return made.unsqueeze(0)


def _attend_by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    _longest: int,
    scaling: float | None,
    *,
    causal: bool,
) -> torch.Tensor:
    _, heads, total, size = query.shape
    made = query.new_empty(1, total, heads, size)
    at = 0
    for length, texts in groupby(starts.diff().tolist()):
        count = sum(1 for _ in texts)
        stop = at + count * length
        q, k, v = (each[0, :, at:stop].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value))
        some = scaled_dot_product_attention(
            q, k, v, scale=scaling, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        made[0, at:stop] = some.transpose(1, 2).flatten(0, 1)
        at = stop
    return made


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
