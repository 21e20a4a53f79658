"""Vectors: the types that they are kept in, and which of them are sound."""

import enum

import numpy as np
import numpy.typing as npt


class VectorType(enum.StrEnum):
    """How a job's vectors are kept."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def element(self) -> "np.dtype[np.floating]":
        """Return the type of an element in memory."""
        return np.dtype(self.value)

    @property
    def column(self) -> str:
        """Return the column of `embeddings` that holds such vectors."""
        return {VectorType.FLOAT32: "vector", VectorType.FLOAT16: "half"}[self]

    def rounded(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return vectors as they come back from where they are kept; an element that is too large is infinite."""
        if self is VectorType.FLOAT32:
            return vectors
        with np.errstate(over="ignore"):
            return vectors.astype(self.element).astype(np.float32)


def sound(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return which vectors, the rows, are finite and not zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    good = np.asarray(np.isfinite(squares) & (squares > 0))
    # A sum of squares may overflow or vanish where the vector doesn't: the few that look bad are looked at closely.
    good[~good] = np.isfinite(vectors[~good]).all(axis=1) & vectors[~good].any(axis=1)
    return good
