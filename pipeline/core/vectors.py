"""Vectors in memory: as they come back from where they are kept, and which of them are sound."""

import numpy as np
import numpy.typing as npt

from pipeline.core.options import VectorType


def rounded(vectors: npt.NDArray[np.float32], kept_as: VectorType) -> npt.NDArray[np.float32]:
    """Return vectors as they come back from where they are kept; an element that is too large is infinite."""
    with np.errstate(over="ignore"):
        return vectors.astype(kept_as.value, copy=False).astype(np.float32, copy=False)


def sound(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return which vectors, the rows, are finite and not zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    good = np.asarray(np.isfinite(squares) & (squares > 0))
    # A sum of squares may overflow or vanish where the vector doesn't: the few that look bad are looked at closely.
    good[~good] = np.isfinite(vectors[~good]).all(axis=1) & vectors[~good].any(axis=1)
    return good
