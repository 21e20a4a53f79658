"""Vectors in memory: shortening, conversion between element types, and a check for zero and non-finite ones."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.options import VectorType

Vectors = npt.NDArray[np.float32]


def stored(vectors: Vectors, kept_as: VectorType) -> npt.NDArray[Any]:
    """Return vectors in the element type that they are kept in; an element that is too large for it is infinite."""
    with np.errstate(over="ignore"):
        return vectors.astype(kept_as.value, copy=False)


def restored(kept: npt.NDArray[Any]) -> Vectors:
    """Return kept vectors as float32."""
    return kept.astype(np.float32, copy=False)


def sound(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows: True where the vector is finite and not zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    good = np.asarray(np.isfinite(squares) & (squares > 0))
    # A sum of squares may overflow or underflow though the vector is sound: check the few suspects by element.
    good[~good] = np.isfinite(vectors[~good]).all(axis=1) & vectors[~good].any(axis=1)
    return good


def shortened(vectors: Vectors, dimensions: int) -> Vectors:
    """Return vectors shortened to `dimensions`, their first ones, and normalised to length one again."""
    cut = vectors[:, :dimensions]
    return np.ascontiguousarray(cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def quantised(vectors: Vectors, kind: str) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """Return vectors as whole numbers of eight bits, in the codes that sentence-transformers and Cohere use.

    `int8` and `uint8`: the largest element of each vector by amount is ±127 (`uint8` adds 128), which keeps cosines.
    `ubinary` and `binary`: the signs, eight a byte, the first in the highest bit (`binary` subtracts 128); the last
    byte is filled up with zeros.
    """
    if kind in ("ubinary", "binary"):
        bits = np.packbits(vectors > 0, axis=1)
        return bits if kind == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    most = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    whole = np.rint(vectors / most * 127)
    return whole.astype(np.int8) if kind == "int8" else (whole + 128).astype(np.uint8)
