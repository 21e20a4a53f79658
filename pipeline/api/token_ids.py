"""OpenAI's token ids, which LangChain sends by default, as text. Nothing is downloaded."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.wire import Decode

if TYPE_CHECKING:
    import tiktoken

#: tiktoken names a cached vocabulary by the SHA-1 of its address.
_VOCABULARY = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


def decoder(cache: Path | None) -> Decode | None:
    """How ids of cl100k_base become text; None unless tiktoken is installed and has its vocabulary in `cache`."""
    name = hashlib.sha1(_VOCABULARY.encode(), usedforsecurity=False).hexdigest()
    if cache is None or not (cache / name).is_file():
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    return decode_by(tiktoken.get_encoding("cl100k_base"))


def decode_by(encoding: "tiktoken.Encoding") -> Decode:
    """How ids of a vocabulary become text. Clients cut texts by tokens, and so in the middle of a character too."""

    def decode(tokens: list[int]) -> str:
        try:
            return encoding.decode(tokens, errors="replace")
        except (KeyError, OverflowError, TypeError) as error:
            raise ValueError("not a token of the vocabulary") from error

    return decode
