"""Roofline of a model: the tokens per second that it would embed at a device's rate of matrix products."""

from functools import cache
from time import perf_counter

import torch

_PRODUCTS = 10
#: Edge of the matrices that are multiplied, by kind of device: as large as a device needs for its full rate.
_EDGES = {"cuda": 4_096, "mps": 2_048}
_EDGE = 512


def flop_per_token(model: torch.nn.Module) -> int:
    """Return the floating-point operations of a token: two for each weight outside of the embeddings.

    Attention's own products, which grow with a text's length, are left out. 0: nothing is multiplied, as in a static
    model.
    """
    tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for weight in module.parameters()
    }
    return 2 * sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)


@cache
def flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return a device's rate of matrix products, the best of a few: other processes may be at work. On a CPU it is the
    rate of this process's threads. 0: it has no memory left for the matrices."""
    edge = _EDGES.get(device.type, _EDGE)
    try:
        left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        return max(2 * edge**3 / _seconds(left, right) for _ in range(_PRODUCTS))
    except RuntimeError:  # torch's error of memory is one; a rate for people must not cost the model
        return 0.0
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    start = perf_counter()
    torch.mm(left, right)
    _wait(left.device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
