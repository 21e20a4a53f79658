"""Decompression of a file, and cutting of its bytes into bounded blocks of whole lines."""

import codecs
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Protocol, assert_never

import zstandard

from pipeline.core.errors import SourceError
from pipeline.sources.source_file import Compression, SourceFile
from pipeline.sources.validation import LongLine

#: Bytes that are read at once, uncompressed.
READ_BYTES = 1024 * 1024

# This many bytes of zstd decompress to 32 MiB at the very most, and of gzip to 1 MiB.
_PACKED_BYTES = 1024
_BOMB_RATIO = 1000
_BOMB_BYTES = 256 * 1024 * 1024

# Magic bytes, independent of file names. Zstandard data may begin with a skippable frame.
_GZIP = (b"\x1f\x8b",)
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))
#: Magic bytes of compressed data; no line in UTF-8 begins with them.
PACKED = (*_GZIP, *_ZSTD)
_PARQUET = (b"PAR1\x15",)


def is_bomb(packed_bytes: int, unpacked_bytes: int) -> bool:
    """Return True if data grows beyond what an honest corpus does (a decompression bomb)."""
    return unpacked_bytes > max(_BOMB_BYTES, _BOMB_RATIO * packed_bytes)


class _Decoder(Protocol):
    """Interface shared by the decompressors of gzip and zstd."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class BrokenStreamError(Exception):
    """The bytes can't be decompressed any further."""

    def __init__(self, fault: str, mend: str) -> None:
        super().__init__(fault, mend)
        self._fault = fault
        self._mend = mend

    def sentence(self, lines: int) -> str:
        """Return the message: the fault, after how many whole lines it is, and the fix."""
        return f"{self._fault} after line {lines:,}; {self._mend}."


def open_blocks(file: SourceFile) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a file, about 1 MiB at a time, without a byte-order mark.

    Raises:
        BrokenStreamError: compressed data ends early, is damaged, or grows beyond reason. The part before the fault
            is yielded first.
        SourceError: the file can't be read, has changed, or isn't UTF-8 by its mark.
    """
    return without_mark(unpacked_blocks(file), file.name)


def unpacked_blocks(file: SourceFile) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a file, about 1 MiB at a time, with any byte-order mark."""
    with file.open() as raw:
        _check_packing(raw, file)
        yield from _unpack(raw, file.compression)


def _check_packing(raw: BinaryIO, file: SourceFile) -> None:
    """Raise `SourceError` if a file's name says that it is compressed, and its first bytes disagree."""
    begun = raw.read(4)
    raw.seek(0)
    expected = {Compression.NONE: (b"",), Compression.GZIP: _GZIP, Compression.ZSTD: _ZSTD}[file.compression]
    if len(begun) == 4 and not begun.startswith(expected):
        raise SourceError(f"{file.name}: not {file.compression} data, as its name says; name it for what it is.")


def open_range(file: SourceFile, start: int, length: int) -> Iterator[bytes]:
    """Yield `length` of a file's uncompressed bytes from byte `start` on. Compressed files are read from the start.

    Raises: as `open_blocks`.
    """
    with file.open() as raw:
        if file.compression is Compression.NONE:
            raw.seek(start)
            blocks, skip = read_blocks(raw), 0
        else:
            blocks, skip = _unpack(raw, file.compression), start
        for block in blocks:
            if skip >= len(block):
                skip -= len(block)
                continue
            piece = block[skip : skip + length]
            skip, length = 0, length - len(piece)
            yield piece
            if not length:
                return


def read_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a stream, at most 1 MiB at a time."""
    while block := stream.read(READ_BYTES):
        yield block


def without_mark(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield blocks without UTF-8's byte-order mark; raise `SourceError` for other marks, compressed data, Parquet."""
    first = next(blocks, b"")
    if first.startswith(PACKED):
        packing, ending = ("gzip", ".gz") if first.startswith(_GZIP) else ("zstd", ".zst")
        raise SourceError(f"{name}: not text but {packing} data; unpack it, or name it with {ending} at the end.")
    if first.startswith(_PARQUET):
        raise SourceError(f"{name}: not text but Parquet; give it as a file whose name ends in .parquet.")
    if first.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise SourceError(f"{name}: the file is UTF-32; save it as UTF-8.")
    # Without a mark, a zero byte in the first character shows UTF-16.
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or first[:2].count(0) == 1:
        raise SourceError(f"{name}: the file is UTF-16; save it as UTF-8.")
    yield first[mark_bytes(first) :]
    yield from blocks


def mark_bytes(first: bytes) -> int:
    """Return the length of a UTF-8 file's byte-order mark, given the file's first block."""
    return len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0


def whole_lines(
    blocks: Iterable[bytes], name: str, bound_bytes: int, quote: bytes = b'"'
) -> Iterator[tuple[int, bytes] | LongLine]:
    """Cut blocks at line ends: yield the number of the first line, and whole lines without the last one's end.

    A line longer than `bound_bytes` (at least 1 MiB) is skipped to its end without being held in memory, and yielded as
    a `LongLine`, which counts its quotes.

    Raises:
        SourceError: compressed data is broken; the message says after which line.
    """
    number = 1
    parts: list[bytes] = []  # parts of a line whose end hasn't come yet
    size = 0
    dropped = _Dropped(quote)
    try:
        for block in blocks:
            end = block.find(b"\n")
            if end < 0:
                parts.append(block)
                size += len(block)
                if size > bound_bytes:
                    dropped.take(parts)
                continue
            if size + end > bound_bytes:
                parts.append(block[:end])
                dropped.take(parts)
                yield LongLine(number, size + end, bound_bytes, dropped.quotes, dropped.blank)
                number, dropped = number + 1, _Dropped(quote)
                block = block[end + 1 :]
            last = block.rfind(b"\n")
            if last >= 0:
                data = b"".join((*parts, block[:last]))
                yield number, data
                number += data.count(b"\n") + 1
            parts = [block[last + 1 :]]
            size = len(parts[0])
    except BrokenStreamError as broken:
        raise SourceError(f"{name}: {broken.sentence(number - 1)}") from None
    if size > bound_bytes:
        yield LongLine(number, size, bound_bytes, dropped.quotes, dropped.blank)
    elif size:
        yield number, b"".join(parts)


class _Dropped:
    """Facts about a line that is too long to be held in memory."""

    def __init__(self, quote: bytes) -> None:
        self._quote = quote
        self.quotes, self.blank = 0, True

    def take(self, parts: list[bytes]) -> None:
        """Inspect parts of the line, and empty their list."""
        self.quotes += sum(part.count(self._quote) for part in parts)
        self.blank = self.blank and not any(part.strip() for part in parts)
        parts.clear()


def _unpack(raw: BinaryIO, compression: Compression) -> Iterator[bytes]:
    match compression:
        case Compression.NONE:
            return read_blocks(raw)
        case Compression.GZIP:
            return _gather(_inflate(raw, lambda: zlib.decompressobj(wbits=31)), "gzip")
        case Compression.ZSTD:
            return _gather(_inflate(raw, lambda: zstandard.ZstdDecompressor().decompressobj()), "zstd")
    assert_never(compression)


def _inflate(raw: BinaryIO, new_decoder: Callable[[], _Decoder]) -> Iterator[bytes]:
    """Yield decompressed pieces of any number of members or frames; raise `EOFError` if the last one isn't complete."""
    decoder: _Decoder | None = None
    read = 0
    unpacked = 0
    while packed := raw.read(_PACKED_BYTES):
        read += len(packed)
        while packed:
            decoder = decoder or new_decoder()
            piece = decoder.decompress(packed)
            unpacked += len(piece)
            if is_bomb(read, unpacked):
                raise OverflowError
            yield piece
            packed = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder or not read:
        raise EOFError


def _gather(pieces: Iterator[bytes], packing: str) -> Iterator[bytes]:
    """Join small pieces and cut large ones; a failure is raised after the data before it has been yielded."""
    parts: list[bytes] = []
    size = 0
    broken = None
    try:
        for piece in pieces:
            parts.append(piece)
            size += len(piece)
            if size >= READ_BYTES:
                yield from _cut(b"".join(parts))
                parts, size = [], 0
    except EOFError:
        broken = BrokenStreamError(f"the {packing} data ends early", "the file is truncated")
    except zstandard.ZstdError as error:
        # The library holds at most 128 MiB of decompressed data.
        fault = "needs too much memory" if "too much memory" in str(error) else "is damaged"
        mend = "pack it again without a long window" if "too much memory" in str(error) else "make the file again"
        broken = BrokenStreamError(f"the {packing} data {fault}", mend)
    except zlib.error:
        broken = BrokenStreamError(f"the {packing} data is damaged", "make the file again")
    except OverflowError:
        broken = BrokenStreamError(f"the {packing} data grows over 1,000-fold", "unpack it first if that is right")
    yield from _cut(b"".join(parts))
    if broken:
        raise broken


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), READ_BYTES):
        yield data[start : start + READ_BYTES]
