"""The text that proves a model: embedded when it is added and before it is used; the two vectors must agree."""

import numpy as np
import numpy.typing as npt

CANARY = "The quick brown fox jumps over the lazy dog, 42 times."
#: Half precision stays above this, and so do a provider's own variations; a wrong model is far below.
_LEAST_COSINE = 0.99


def is_canary(vector: npt.NDArray[np.float32], expected: bytes) -> bool:
    """Whether this is the canary's vector, as the catalogue has it (little-endian float32)."""
    theirs = np.frombuffer(expected, dtype="<f4")
    return vector.shape == theirs.shape and cosine(vector, theirs) >= _LEAST_COSINE


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is zero, NaN where one isn't finite."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0
