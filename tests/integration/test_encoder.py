"""Encoder compared with sentence-transformers, and on devices and models that fail."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from pipeline.core.errors import ModelError
from tests.acceptance.oracle import cosine
from tests.support.tiny_models import KINDS
from workers.encoders.batching import Tokenised
from workers.encoders.local import LocalEncoder
from workers.encoders.reading import Ids
from workers.encoders.roofline import flop_per_second

LONG = " ".join(f"word {n}" for n in range(1_000))
TEXTS = ["short", LONG, "naïve café 数学 🙂", "  spaces  ", "x", *(f"number {n}" for n in range(50))]


@pytest.fixture(scope="module")
def encoder(bundled_model: Path) -> LocalEncoder:
    return LocalEncoder(bundled_model, "cpu")


@pytest.fixture(params=["bundled_model", "static_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_vectors_equal_the_librarys(folder: Path) -> None:
    ours = LocalEncoder(folder, "cpu")
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    vectors = ours.encode(ours.tokenise(TEXTS))
    assert vectors.dtype == np.float32
    assert min(cosine(mine, other) for mine, other in zip(vectors, theirs, strict=True)) >= 0.99999


def test_a_document_prompt_is_read_before_each_text(bundled_model: Path) -> None:
    ours = LocalEncoder(bundled_model, "cpu", document_prompt="passage: ")
    theirs = SentenceTransformer(str(bundled_model), device="cpu").encode(TEXTS, prompt="passage: ")
    vectors = ours.encode(ours.tokenise(TEXTS))
    assert min(cosine(mine, other) for mine, other in zip(vectors, theirs, strict=True)) >= 0.99999


def test_texts_are_read_once_and_truncation_is_told(encoder: LocalEncoder) -> None:
    tokenised = encoder.tokenise(TEXTS)
    assert tokenised.lengths[0] == 3, "a word and two special tokens"
    assert tokenised.lengths[1] == encoder.max_item_tokens == 256
    assert np.flatnonzero(tokenised.truncated).tolist() == [1]
    shorter = encoder.tokenise(TEXTS, 4)
    assert shorter.lengths.max() == 4
    assert shorter.ids[1][-1] == tokenised.ids[1][-1], "the closing token stays"


@pytest.mark.parametrize("most_running", [1, 2])
def test_out_of_memory_halves_the_budget_and_remembers(
    bundled_model: Path, monkeypatch: pytest.MonkeyPatch, most_running: int
) -> None:
    encoder = LocalEncoder(bundled_model, "cpu")
    monkeypatch.setattr(encoder, "_most_running", most_running)
    texts = ["a text of some ten or eleven tokens, all in all"] * 160
    expected = encoder.encode(encoder.tokenise(texts))
    forward, before = encoder._forward, encoder.budget_tokens

    def small_device(ids: list[Ids]) -> Any:
        if sum(map(len, ids)) > 200:
            raise torch.OutOfMemoryError("out of memory")
        return forward(ids)

    monkeypatch.setattr(encoder, "_forward", small_device)
    vectors = encoder.encode(encoder.tokenise(texts))
    assert np.abs(vectors - expected).max() < 1e-6
    assert 50 <= encoder.budget_tokens <= 512 < before, "halved for the batch that failed, not for each after it"


@pytest.mark.parametrize("most_running", [1, 2])
def test_one_text_that_fails_comes_back_alone(
    encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch, most_running: int
) -> None:
    monkeypatch.setattr(encoder, "_most_running", most_running)
    forward = encoder._forward
    tokenised = encoder.tokenise(TEXTS)
    bad = tokenised.ids[7].tolist()

    def fails(ids: list[Ids]) -> Any:
        if bad in [each.tolist() for each in ids]:
            raise IndexError("index out of range in self")
        return forward(ids)

    monkeypatch.setattr(encoder, "_forward", fails)
    batches = list(encoder.batches(tokenised))
    failed = [batch for batch in batches if batch.vectors is None]
    assert [batch.at.tolist() for batch in failed] == [[7]]
    assert failed[0].failure == ("encode_failed", "the model raised IndexError"), "no word of the text"
    assert sorted(at for batch in batches for at in batch.at.tolist()) == list(range(len(TEXTS)))


def test_a_text_without_tokens_fails_alone(encoder: LocalEncoder) -> None:
    tokenised = encoder.tokenise(TEXTS[:3])
    expected = encoder.encode(tokenised)
    lengths = np.append(tokenised.lengths, 0).astype(np.int32)
    with_empty = Tokenised([*tokenised.ids, np.zeros(0, np.int32)], lengths, np.append(tokenised.truncated, False))
    found: dict[int, Any] = {}
    for batch in encoder.batches(with_empty):
        vectors = [None] if batch.vectors is None else batch.vectors
        found.update(zip(batch.at.tolist(), vectors, strict=True))
    assert found.pop(3) is None
    assert np.abs(np.stack([found[at] for at in range(3)]) - expected).max() < 1e-6


@pytest.mark.parametrize("most_running", [1, 2])
def test_no_batch_is_begun_after_stop_and_those_in_flight_come(
    encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch, most_running: int
) -> None:
    monkeypatch.setattr(encoder, "_most_running", most_running)
    monkeypatch.setattr(encoder, "budget_tokens", 50)
    tokenised = encoder.tokenise(TEXTS)
    expected = encoder.encode(tokenised)
    batches = list(encoder.batches(tokenised, lambda: True))
    assert len(batches) == most_running
    for batch in batches:
        assert batch.vectors is not None
        assert np.array_equal(batch.vectors, expected[batch.at])


def test_padding_is_counted_where_there_is_any(encoder: LocalEncoder, tmp_path: Path) -> None:
    (kind,) = (each for each in KINDS if each.name.startswith("MPNet"))
    kind.make(tmp_path / "model")
    for each, has_padding in ((encoder, False), (LocalEncoder(tmp_path / "model", "cpu"), True)):
        tokenised = each.tokenise(TEXTS)
        padded = sum(batch.padded_tokens for batch in each.batches(tokenised))
        assert bool(padded > tokenised.lengths.sum()) is has_padding
        assert has_padding or padded == tokenised.lengths.sum()


def test_the_canary_tells_another_model(bundled_model: Path, bundled_description: dict[str, Any]) -> None:
    encoder = LocalEncoder(bundled_model, "cpu")
    expected = bytes.fromhex(bundled_description["canary"])
    encoder.prove(expected)
    with pytest.raises(ModelError, match="canary"):
        encoder.prove(np.roll(np.frombuffer(expected, "<f4"), 1).tobytes())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        LocalEncoder(tmp_path, "cpu")


_DOCUMENT = " ".join(f"In chapter {n} the miller's naïve daughter grinds rye, at last!" for n in range(4_000))


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (_DOCUMENT, False),
        ("\u6570" * 60_000, False),
        ("." * 60_000, False),
        (" " * 60_000, True),
        (" " * 60_000 + _DOCUMENT, True),
        ("a" * 60_000, True),
        ("ab " * 252 + " " * (16_384 - 756 - 20) + "unbelievabilities" * 3_000 + " the end" * 900, True),
        ("the end " * 253 + "unbelievabilities" * 3_000, True),
    ],
    ids=[
        "prose",
        "ideographs",
        "dots",
        "spaces",
        "spaces first",
        "a word",
        "cut in a word at the bound",
        "a word last",
    ],
)
def test_of_a_long_text_no_more_is_read_than_decides(
    encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch, text: str, whole: bool
) -> None:
    monkeypatch.setattr("workers.encoders.reading.MOST_CHARACTERS_PER_TOKEN", 1_000_000)
    expected = encoder.tokenise([text, "short"])
    monkeypatch.undo()
    reader = encoder._documents.reader
    read = _Noting(reader._fast)
    monkeypatch.setattr(reader, "_fast", read)
    found = encoder.tokenise([text, "short"])
    assert [each.tolist() for each in found.ids] == [each.tolist() for each in expected.ids]
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.truncated.tolist() == expected.truncated.tolist()
    assert (max(read.characters) > 256 * 64) == whole


class _Noting:
    """Tokeniser that records the length of each text it reads."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.characters: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
        self.characters += map(len, texts)
        return self._fast.encode_batch_fast(texts, **how)


def test_a_batch_tells_its_time_at_the_roofline(encoder: LocalEncoder, static_model: Path) -> None:
    (batch,) = encoder.batches(encoder.tokenise(TEXTS[:3]))
    width, inner, layers = 384, 1_536, 6
    products = 2 * layers * (4 * width**2 + 2 * width * inner)
    flop = batch.roofline_seconds / batch.tokens.sum() * flop_per_second(torch.device("cpu"), torch.float32)
    assert flop == pytest.approx(products, rel=0.03), "biases and norms count, though hardly"
    static = LocalEncoder(static_model, "cpu")
    assert [batch.roofline_seconds for batch in static.batches(static.tokenise(TEXTS[:3]))] == [0]
