"""Detection of a model's own token ids, as opposed to OpenAI's."""

from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel

from workers.encoders.own_ids import OwnIds

LONG = "A mill grinds grain between two stones; the miller pays attention to the water, the wheel and the embeddings."
TEXTS = [LONG, "naïve café — “quoted” 12345678 🙂 数学", "def f(x): return x[0] + 1  # comment", "two words"]


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path) -> Tokenizer:
    """Return the tokeniser of a BERT model."""
    return Tokenizer.from_file(str(bundled_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def own(tokenizer: Tokenizer) -> OwnIds:
    return OwnIds(tokenizer)


def ids_of(tokenizer: Tokenizer, text: str, **how: Any) -> list[int]:
    found: list[int] = tokenizer.encode(text, **how).ids
    return [each for each in found if each]  # the tokeniser pads with zeros


@pytest.mark.parametrize("text", TEXTS)
def test_marked_ids_are_its_own(own: OwnIds, tokenizer: Tokenizer, text: str) -> None:
    assert own.find({7: ids_of(tokenizer, text)}) == 7


def test_many_ids_are_its_own_without_marks_too(own: OwnIds, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, LONG, add_special_tokens=False)
    assert len(ids) > 16
    assert own.find({0: ids_of(tokenizer, "two words", add_special_tokens=False), 3: ids}) == 3
    assert own.find({0: ids + [0] * 20}) == 0, "padded"
    cut = ids_of(tokenizer, (LONG + " ") * 3, add_special_tokens=False)
    for length in range(40, 48):
        assert own.find({0: cut[:length]}) == 0, "cut, maybe within a word"


def test_short_ones_are_its_own_if_all_of_a_request_could_be(
    own: OwnIds, tokenizer: Tokenizer, cl100k: tiktoken.Encoding
) -> None:
    words = LONG.split()
    short = {at: ids_of(tokenizer, " ".join(words[at : at + 3]), add_special_tokens=False) for at in range(2, 16)}
    assert own.find(short) == 2
    assert own.find(short | {20: cl100k.encode("and one of another vocabulary")}) is None


@pytest.mark.parametrize("text", TEXTS)
def test_openais_arent(own: OwnIds, cl100k: tiktoken.Encoding, text: str) -> None:
    ids = cl100k.encode_ordinary(text)
    assert own.find({0: ids}) is None
    assert own.find({at: ids[at:] for at in range(len(ids))}) is None


def test_the_same_few_again_and_again_arent(own: OwnIds, cl100k: tiktoken.Encoding) -> None:
    assert own.find({at: cl100k.encode("long words " * 500) for at in range(20)}) is None


@pytest.mark.parametrize("ids", [[-1], [2**40], [30_522], [0], [101], [102, 101], [15339, 1917]])
def test_any_numbers_are_looked_at(own: OwnIds, ids: list[int]) -> None:
    assert own.find({0: ids}) is None


def test_of_a_byte_level_bpe_only_marks_tell() -> None:
    """Ids of another vocabulary, read one after the other, often are ids that a byte-level BPE would make too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 2, **{letter: 3 + n for n, letter in enumerate(alphabet)}}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    plain = bpe.encode(LONG).ids
    bpe.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    own = OwnIds(bpe)
    assert own.find({0: plain}) is None
    assert own.find({0: bpe.encode(LONG).ids}) == 0
