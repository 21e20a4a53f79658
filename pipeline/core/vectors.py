"""Vectors in memory: conversion to and from their stored type, and a check for zero and non-finite ones."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.options import VectorType


def stored(vectors: npt.NDArray[np.float32], kept_as: VectorType) -> npt.NDArray[Any]:
    """Return vectors in the element type that they are kept in; an element that is too large for it is infinite."""
    with np.errstate(over="ignore"):
        return vectors.astype(kept_as.value, copy=False)


def restored(kept: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return kept vectors as float32."""
    return kept.astype(np.float32, copy=False)


def sound(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows: True where the vector is finite and not zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    good = np.asarray(np.isfinite(squares) & (squares > 0))
    # A sum of squares may overflow or underflow though the vector is sound: check the few suspects by element.
    good[~good] = np.isfinite(vectors[~good]).all(axis=1) & vectors[~good].any(axis=1)
    return good
