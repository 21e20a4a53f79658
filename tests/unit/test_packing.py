"""Compressed bodies, without a network."""

import gzip
import zlib
from collections.abc import Iterable

import pytest
import zstandard

from pipeline.api.packing import _unpack
from pipeline.core.errors import InvalidPayload, PayloadTooLarge

BODY = b'{"model": "m", "input": "' + b"a" * 1_000 + b'"}'
MOST = len(BODY)


def bare(body: bytes) -> bytes:
    """Return raw deflate, without a zlib header, as some clients send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def gzipped(body: bytes) -> bytes:
    """Return gzip data without a timestamp, so that all processes that collect the tests get the same parameters."""
    return gzip.compress(body, mtime=0)


PACKED = {
    "gzip": [gzipped(BODY), gzipped(BODY[:9]) + gzipped(BODY[9:])],
    "deflate": [zlib.compress(BODY), zlib.compress(BODY, 0), bare(BODY)],
    "zstd": [zstandard.compress(BODY), zstandard.compress(BODY[:9]) + zstandard.compress(BODY[9:])],
}
EACH = [(coding, packed) for coding, each in PACKED.items() for packed in each]


@pytest.mark.parametrize(("coding", "packed"), EACH)
def test_up_to_the_bound_and_no_further(coding: str, packed: bytes) -> None:
    assert _unpack(coding, packed, MOST) == BODY
    with pytest.raises(PayloadTooLarge):
        _unpack(coding, packed, MOST - 1)


def broken() -> Iterable[tuple[str, bytes]]:
    for coding, (packed, *_) in PACKED.items():
        yield from ((coding, wrong) for wrong in (b"", b"x", BODY, b"\xff" * 99))
        if coding != "zstd":  # truncated zstd is read in part; the JSON parser notices
            yield coding, packed[:-5]
    yield "zstd", PACKED["gzip"][0]


@pytest.mark.parametrize(("coding", "packed"), list(broken()))
def test_what_isnt_packed_so(coding: str, packed: bytes) -> None:
    if coding != "deflate" and not packed:
        assert _unpack(coding, packed, MOST) == b""
        return
    with pytest.raises(InvalidPayload, match=f"isn't the {coding}"):
        _unpack(coding, packed, MOST)
