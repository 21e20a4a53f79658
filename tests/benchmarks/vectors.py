"""Comparison of two libraries' vectors."""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
#: Least cosine of vectors that count as equal.
LEAST_COSINE = 1 - 1e-5


def least_cosine(some: Vectors, others: Vectors) -> float:
    """Return the least cosine of a text's two vectors."""
    a, b = some.astype(np.float64), others.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.min())
