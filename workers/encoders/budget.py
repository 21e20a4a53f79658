"""Token budget of a forward pass, as a model begins with it on a device."""

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

#: Tokens with padding. A CPU is fastest while a batch fits its caches.
_CPU_TOKENS, _MPS_TOKENS = 1_024, 8_192
#: Upper bound on CUDA, where larger passes are faster until they keep the device busy.
_MOST_CUDA_TOKENS = 65_536
_LEAST_CUDA_TOKENS = 1_024
#: Models without attention read a flat list of ids: no padding, so bigger batches.
_FLAT_TOKENS = 131_072
#: Share of the free memory that a pass may take by the estimate, which leaves out what attention makes where no kernel
#: computes it in parts. Another replica may begin with the same free memory.
_FREE_SHARE = 1 / 4
#: Vectors of a token that are alive at once within a layer: of the hidden size its input, that normalised, queries,
#: keys, values, the attention's result, its projection and the sum; of the inner size both halves of a gated
#: feed-forward layer and their product.
_HIDDEN_VECTORS, _INNER_VECTORS = 8, 3


def starting_tokens(model: SentenceTransformer, device: torch.device, *, flat: bool) -> int:
    """Return the tokens of a forward pass with which a model begins. `flat`: it reads a flat list of ids."""
    if flat:
        return _FLAT_TOKENS
    if device.type != "cuda":
        return _CPU_TOKENS if device.type == "cpu" else _MPS_TOKENS
    # What torch has set aside and doesn't use counts as free.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    size = max(activation_bytes(part.model) for part in model.modules() if isinstance(part, Transformer))
    return max(_LEAST_CUDA_TOKENS, min(_MOST_CUDA_TOKENS, int(free * _FREE_SHARE / size)))


def activation_bytes(transformer: Any) -> int:
    """Estimate the memory that a token takes in a pass through a transformer of the library, in the type that it is
    loaded in. A layer's results are freed when the next one has read them, so that their number doesn't count."""
    config = transformer.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    vectors = _HIDDEN_VECTORS * config.hidden_size + _INNER_VECTORS * inner
    return int(vectors * transformer.dtype.itemsize)
