"""Source file of a corpus, with the format and compression that its name tells."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core.chunks import Extent
from pipeline.core.options import Columns
from pipeline.infra import storage
from pipeline.sources.validation import Notices, Parsed

STDIN = "standard input"

Numbers = npt.NDArray[np.int64]


class Compression(enum.StrEnum):
    """Compression of a file."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


#: File, or its uncompressed blocks if it has no name, columns, the longest text in bytes, notices → its rows.
Read = Callable[["SourceFile", Iterator[bytes] | None, Columns, int, Notices], Iterator[Parsed]]
#: File, columns, the longest text in bytes, notices → the places of its rows, in order; checks the columns too.
Locate = Callable[["SourceFile", Columns, int, Notices], Iterator["Places"]]
#: File, a chunk's extent in it, its number of rows, columns, the longest text in bytes → its rows.
ReadExtent = Callable[["SourceFile", Extent, int, Columns, int], Iterator[Parsed]]


class Places(Protocol):
    """Places of consecutive rows of a file, as columns of equal length."""

    @property
    def sizes(self) -> Numbers:
        """Bytes of each row; for Parquet, the average of the columns that are read, in its row group."""

    def extent(self, file: "SourceFile", at: int, last: Any, last_at: int) -> Extent:
        """Return the extent from row `at` here to row `last_at` of `last`, these or later places of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """File format: its names, its traits and its readers."""

    #: Part of the fingerprint of uploads.
    name: str
    #: File extensions, the best known one first.
    endings: tuple[str, ...]
    #: Unit that a row's number counts, in messages.
    unit: str = "line"
    #: True if such a file may also be compressed as a whole.
    packable: bool = True
    #: True if the format has a delimiter and a quote.
    divided: bool = False
    read: Read
    locate: Locate
    read_extent: ReadExtent


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """File of a corpus, as it was when the corpus was listed, or the standard input."""

    #: Name as the user wrote it, for messages.
    name: str
    #: Absolute path, or URI of an object; `None` for the standard input.
    uri: str | None
    format: Format
    compression: Compression
    #: Size as stored, possibly compressed; `None` for the standard input.
    bytes: int | None
    #: Changes when the file does; `None` for the standard input.
    etag: str | None

    def open(self, read_bytes: int | None = None) -> BinaryIO:
        """Open the file as it was listed.

        Raises, also at a later read:
            SourceChanged: the file has changed since then.
            StorageRefused, StorageUnreachable
        """
        assert self.uri is not None
        assert self.etag is not None
        return storage.open_file(self.uri, self.etag, read_bytes)

    def check_unchanged(self) -> None:
        """Raise `SourceChanged` if the file is no longer the one that was listed."""
        if self.uri is not None:
            self.open().close()


def reason(error: OSError) -> str:
    """Return the operating system's reason for a refusal, for the middle of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or "can't be read").lower()
