"""Vectors that must never be written."""

import numpy as np
import pytest

from pipeline.chunk_io.commit import split_bad_vectors
from pipeline.core.chunks import RejectCode
from pipeline.core.options import VectorType
from pipeline.db.embeddings import NO_ROWS, EmbeddedRows

GOOD = [1.0, 2.0, 3.0]


def rows(*vectors: list[float]) -> EmbeddedRows:
    return EmbeddedRows(
        indexes=np.arange(10, 10 + len(vectors)),
        keys=[f"k{at}" for at in range(len(vectors))],
        vectors=np.array(vectors, dtype=np.float32),
        tokens=np.arange(len(vectors), dtype=np.int32),
        truncated=np.array([at % 2 == 0 for at in range(len(vectors))]),
    )


@pytest.mark.parametrize(
    ("vector", "half", "bad"),
    [
        ([np.nan, 1, 1], False, True),
        ([1, np.inf, 1], False, True),
        ([1, 1, -np.inf], True, True),
        ([0, 0, 0], False, True),
        ([0, -0.0, 0], True, True),
        ([1e-40, 0, 0], False, False),
        ([1e-9, 0, 0], True, True),
        ([65504, 1, 1], True, False),
        ([65600, 1, 1], True, True),
        ([65600, 1, 1], False, False),
    ],
)
def test_bad_vectors_become_rejects(vector: list[float], half: bool, bad: bool) -> None:
    kept, rejects = split_bad_vectors(rows(GOOD, vector, GOOD), 3, VectorType.FLOAT16 if half else VectorType.FLOAT32)
    assert kept.indexes.tolist() == ([10, 12] if bad else [10, 11, 12])
    assert [(each.index, each.key, each.code) for each in rejects] == [(11, "k1", RejectCode.BAD_VECTOR)] * bad
    assert len(kept.keys) == len(kept.vectors) == len(kept.tokens) == len(kept.truncated)


def test_columns_stay_together() -> None:
    kept, _ = split_bad_vectors(rows([0, 0, 0], GOOD, [4, 5, 6]), 3, VectorType.FLOAT32)
    assert kept.keys == ["k1", "k2"]
    assert kept.vectors.tolist() == [GOOD, [4, 5, 6]]
    assert (kept.tokens.tolist(), kept.truncated.tolist()) == ([1, 2], [False, True])


@pytest.mark.parametrize("dimensions", [2, 4])
def test_another_size_is_an_error(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"for 1 × {dimensions}"):
        split_bad_vectors(rows(GOOD), dimensions, VectorType.FLOAT32)


def test_no_rows_are_good() -> None:
    assert split_bad_vectors(NO_ROWS, 3, VectorType.FLOAT32) == (NO_ROWS, [])
