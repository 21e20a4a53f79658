"""Canary text of a model: embedded when the model is added and again before use; the two vectors must agree."""

import numpy as np
import numpy.typing as npt

CANARY = "The quick brown fox jumps over the lazy dog, 42 times."
#: Half precision and a provider's own variations stay above this; a wrong model is far below.
_LEAST_COSINE = 0.99


def is_canary(vector: npt.NDArray[np.float32], expected: bytes) -> bool:
    """Return True if the vector agrees with the canary's vector in the catalogue (little-endian float32)."""
    theirs = np.frombuffer(expected, dtype="<f4")
    return vector.shape == theirs.shape and cosine(vector, theirs) >= _LEAST_COSINE


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return the cosine of the angle between two vectors: 0 if one of them is zero, NaN if one isn't finite."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0
