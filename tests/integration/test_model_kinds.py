"""Models of every kind: each gives the same documents and queries as sentence-transformers alone, or is refused in
one line. The table of them is in docs/explanation/decisions."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from pipeline.catalog.models import from_portable
from pipeline.core.errors import ModelError
from tests.support.tiny_models import KINDS, Kind
from workers import oneshot
from workers.encoders.batching import Tokenised
from workers.encoders.model_cache import Loader
from workers.encoders.weights import WeightsSource

TABLE = (
    Path(__file__).resolve().parents[2]
    / "docs"
    / "explanation"
    / "decisions"
    / "0014-a-model-is-proven-both-ways-or-refused.md"
)
TEXTS = [
    "miller",
    "The quick brown fox",
    "Grinds rye, AT LAST: naïve café 数学 [MASK] </s>",
    "word " * 30,
    " ".join(f"the miller's daughter {n}, unbelievabilities and rye" for n in range(90)),
    "rye " + "fox " * 700 + "at last",
]


def oracle(folder: Path, pooling: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the vectors of documents and queries by the library alone, in float32."""
    if pooling:
        transformer = Transformer(str(folder))
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
        model = SentenceTransformer(modules=modules, device="cpu")
    else:
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    model.float()
    return model.encode_document(TEXTS), model.encode_query(TEXTS)


def ours(folder: Path, pooling: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the vectors of documents and queries, encoded in the same batches, of the model as it is added and as a
    worker loads it."""
    described = oneshot.describe(WeightsSource(path=str(folder)), pooling)
    del described["notes"], described["device"]
    model = from_portable({**described, "name": "tiny", "slug": "tiny", "upstream": None})
    encoder = Loader("cpu", None, "float32").load(model)
    encoder.prove(model.canary)
    documents, queries = encoder.tokenise(TEXTS), encoder.tokenise(TEXTS, queries=True)
    both = Tokenised(
        [*documents.ids, *queries.ids],
        np.concatenate([documents.lengths, queries.lengths]),
        np.concatenate([documents.truncated, queries.truncated]),
    )
    assert encoder.dimensions == described["dimensions"]
    vectors = encoder.encode(both)
    return vectors[: len(TEXTS)], vectors[len(TEXTS) :]


def outcome(kind: Kind, folder: Path) -> str:
    """Return a kind's outcome for the table."""
    try:
        documents, queries = ours(folder, kind.pooling)
    except ModelError as error:
        said = str(error)
        assert "\n" not in said
        assert re.search(kind.refused or "$.", said), said
        said = said.replace(f"{folder}: ", "").replace(str(folder), "…")
        return "refused: " + re.sub(r"\d+\.\d+%|\d+(?= rows)", "…", said)  # rounding and training decide these numbers
    assert not kind.refused
    for mine, theirs in zip((documents, queries), oracle(folder, kind.pooling), strict=True):
        assert mine.dtype == theirs.dtype == np.float32
        assert np.abs(mine - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())
    return "equal"


def table(outcomes: dict[str, str]) -> str:
    """Return the outcomes as rows of the document's table."""
    return "\n".join(f"| {name} | {said} |" for name, said in outcomes.items())


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, str]]:
    """Yield a dict for each kind's outcome. Once all kinds have run, the document must hold the same table."""
    found: dict[str, str] = {}
    yield found
    if found.keys() == {kind.name for kind in KINDS}:
        assert table(found) in TABLE.read_text(), f"the table of {TABLE.name} must be:\n{table(found)}"


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_model_is_equal_to_the_librarys_or_refused(
    kind: Kind, outcomes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oneshot, "_rate", lambda _: 1.0)  # its speed doesn't matter here
    torch.manual_seed(7)
    folder = tmp_path / "model"
    kind.make(folder)
    outcomes[kind.name] = outcome(kind, folder)
