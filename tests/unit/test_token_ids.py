"""OpenAI's token ids as text, by a vocabulary of bytes."""

from pathlib import Path

import pytest
import tiktoken

from pipeline.api.token_ids import decode_by, decoder

VOCABULARY = tiktoken.Encoding(
    name="bytes", pat_str=r"(?s).", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={"<end>": 300}
)


def test_a_slice_may_end_in_the_middle_of_a_character() -> None:
    decode = decode_by(VOCABULARY)
    tokens = list("naïve 数".encode())
    assert decode(tokens) == "naïve 数"
    assert decode(tokens[:-1]) == "naïve \ufffd"
    assert decode(tokens[3:]) == "\ufffdve 数"


@pytest.mark.parametrize("unknown", [256, 299, 301, -1, 2**32, 2**70])
def test_an_id_that_is_none_is_refused(unknown: int) -> None:
    with pytest.raises(ValueError, match="not a token"):
        decode_by(VOCABULARY)([104, unknown])


def test_without_a_vocabulary_there_is_no_decoder(tmp_path: Path) -> None:
    assert decoder(None) is None
    assert decoder(tmp_path) is None
