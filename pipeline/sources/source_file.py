"""A file of a corpus, and what its name says of it: how it holds its rows, and how it is packed."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from pipeline.core.chunks import Extent
from pipeline.core.options import Columns
from pipeline.infra import storage

if TYPE_CHECKING:
    from pipeline.sources.places import Places
    from pipeline.sources.validation import Notices, Parsed

STDIN = "standard input"


class Compression(enum.StrEnum):
    """How a file is packed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


#: A file, or its unpacked blocks where it has no name, columns, the longest text in bytes, what to note → its rows.
Read = Callable[["SourceFile", Iterator[bytes] | None, Columns, int, "Notices"], Iterator["Parsed"]]
#: The same → where its rows begin, in order; columns are checked on the way.
Locate = Callable[["SourceFile", Columns, int, "Notices"], Iterator["Places"]]
#: A file, a chunk's extent in it, how many rows that has, columns, the longest text in bytes → its rows.
ReadExtent = Callable[["SourceFile", Extent, int, Columns, int], Iterator["Parsed"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How files of a kind hold their rows."""

    #: Part of what uploads are known by.
    name: str
    #: Of a file's name, the first one best known.
    endings: tuple[str, ...]
    #: What a row's number counts, in messages.
    unit: str = "line"
    #: Whether such a file is also read packed as a whole.
    packable: bool = True
    #: Whether it has a delimiter and a quote.
    divided: bool = False
    read: Read
    locate: Locate
    read_extent: ReadExtent


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a corpus, as it was when the corpus was listed; or the standard input."""

    #: As the user wrote it; messages use it.
    name: str
    #: Absolute path, or URI of an object; `None` for the standard input.
    uri: str | None
    format: Format
    compression: Compression
    #: Size where it is kept; `None` for the standard input.
    bytes: int | None
    #: Changes when the file does; `None` for the standard input.
    etag: str | None

    def open(self) -> BinaryIO:
        """The file as it was listed.

        Raises, also at a later read:
            SourceChanged: it isn't that file any more.
            StorageRefused, StorageUnreachable
        """
        assert self.uri is not None
        assert self.etag is not None
        return storage.open_file(self.uri, self.etag)

    def check_unchanged(self) -> None:
        """Raise `SourceChanged` if the file is no longer the one that was listed."""
        if self.uri is not None:
            self.open().close()


def reason(error: OSError) -> str:
    """Why the operating system refused, for the middle of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or "can't be read").lower()
