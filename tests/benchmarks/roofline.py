"""Roof of an encoder's speed: the rate of matrix products that a device reaches, over the operations a token takes."""

import json
from pathlib import Path
from time import perf_counter

import torch

_WARM_UP, _PRODUCTS = 3, 10


def flops_per_token(folder: Path) -> int:
    """Return 2 × the weights of a BERT without its embeddings. Attention's own products, which grow with a text's
    length, are left out."""
    config = json.loads((folder / "config.json").read_bytes())
    width, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return int(2 * layers * (4 * width**2 + 2 * width * inner))


class MatrixProduct:
    """Product of two random square matrices, to be timed."""

    def __init__(self, device: str, dtype: torch.dtype, size: int) -> None:
        self._left, self._right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        self._out = torch.empty_like(self._left)
        self._flops = 2 * size**3 * _PRODUCTS
        for _ in range(_WARM_UP):
            self._multiply()

    def flops_per_second(self) -> float:
        """Return the rate of floating-point operations, measured now."""
        self._wait()
        start = perf_counter()
        for _ in range(_PRODUCTS):
            self._multiply()
        self._wait()
        return self._flops / (perf_counter() - start)

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._out)

    def _wait(self) -> None:
        if self._left.is_cuda:
            torch.cuda.synchronize(self._left.device)
