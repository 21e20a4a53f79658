"""Sources of a corpus: files, folders or the standard input, streamed as blocks of validated rows in bounded memory.

`discovery` finds the files, `decode` decompresses them into whole lines, `formats` is the registry of `jsonl`, `csv_`
and `parquet`, which parse rows, and `validation` validates them; `query` reads rows from a database. `places` locates
the rows of files, and `by_reference` reads them there, for workers. A bad row becomes a reject and the rest goes on; a
broken file or a wrong column ends the reading with an error.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, BinaryIO, Protocol

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.decode import read_blocks, without_mark
from pipeline.sources.discovery import find_files
from pipeline.sources.source_file import STDIN, Compression, Places, SourceFile
from pipeline.sources.validation import Notices, Parsed, Rows, judge

__all__ = ["Compression", "Corpus", "Rows", "Source", "SourceFile"]


class Source(Protocol):
    """Source of a job's rows."""

    columns: Columns
    #: Longest text in bytes; a longer one is rejected.
    item_bytes: int
    #: Notices for a person, from as much as has been read.
    notices: Notices

    @property
    def name(self) -> str:
        """Name of the source in messages."""

    def inputs(self) -> list[dict[str, Any]]:
        """Return the inputs that the job records, in order: `uri`, `etag` and `bytes`, without secrets."""

    def fingerprint(self) -> str | None:
        """Return the SHA-256 over all that determines the rows; `None` while it must be read for that."""

    def read_fingerprint(self) -> str:
        """Return the fingerprint, reading the source if need be."""

    def blocks(self) -> Iterator[Rows]:
        """Yield every row once, in order, validated, in bounded memory."""


class Corpus:
    """Rows of SOURCE arguments: files, folders, and `-` for JSON lines on the standard input."""

    def __init__(
        self,
        sources: Sequence[str],
        columns: Columns,
        item_bytes: int,
        stdin: BinaryIO | None = None,
    ) -> None:
        """List the files; none is read yet.

        Args:
            sources: paths, and `-`.
            columns: the columns to read.
            item_bytes: the longest text in bytes; a longer one is rejected.
            stdin: the stream to read for `-`, instead of this process's own.

        Raises:
            SourceError: a source doesn't exist, is given twice, or is of an unsupported type.
        """
        #: Files in the order they are read.
        self.files: list[SourceFile] = find_files(sources)
        #: SHA-256 of the bytes of the standard input, in hexadecimal, once it has been read to its end.
        self.stream_sha256: str | None = None
        self.columns = columns
        self.item_bytes = item_bytes
        self.notices = Notices()
        self._stdin = stdin

    @property
    def name(self) -> str:
        """Name in messages: the names of its first three files."""
        names = [file.name for file in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")

    def inputs(self) -> list[dict[str, Any]]:
        """Return the inputs that the job records, one per file."""
        return [{"uri": file.uri or "-", "etag": file.etag, "bytes": file.bytes} for file in self.files]

    def fingerprint(self) -> str | None:
        """Return the SHA-256 over each file's URI, size and ETag or time, a stream's bytes, and the columns.

        `None` with a stream that has not been read yet.
        """
        if self.stream_sha256 is None and any(file.uri is None for file in self.files):
            return None
        files = [(file.uri or self.stream_sha256, file.bytes, file.etag) for file in self.files]
        return hashlib.sha256(json.dumps([files, self.columns.identity]).encode()).hexdigest()

    def read_fingerprint(self) -> str:
        """Return the fingerprint; a stream is read to its end for it, and its rows are lost."""
        if self.fingerprint() is None:
            for _ in self._hashed(self._stdin or sys.stdin.buffer):
                pass
        known = self.fingerprint()
        assert known is not None
        return known

    def places(self, file: SourceFile) -> Iterator[Places]:
        """Yield the places of a file's rows, for workers that read them themselves.

        Raises:
            SourceError: as `blocks`, except for a single bad line of JSON.
        """
        yield from file.format.locate(file, self.columns, self.item_bytes, self.notices)
        file.check_unchanged()

    def blocks(self) -> Iterator[Rows]:
        """Yield every row once, in order. With a stream, this works only once.

        Raises:
            SourceError: a file is broken, changed since it was listed, or lacks a column.
        """
        for file in self.files:
            yield from self.rows_of(file)

    def rows_of(self, file: SourceFile) -> Iterator[Rows]:
        """Yield every row of a file. Raises as `blocks`."""
        place = f"{file.format.unit} "
        if len(self.files) > 1:
            place = f"{file.name} {place}"
        for parsed in self._read(file):
            yield judge(parsed, self.item_bytes, place)
        file.check_unchanged()

    def again(self) -> "Corpus":
        """Return the same source, to be read once more.

        Raises:
            SourceError: it has a stream that can't go back to its beginning.
        """
        if any(file.uri is None for file in self.files):
            stream = self._stdin or sys.stdin.buffer
            if not stream.seekable():
                raise SourceError(f"{STDIN} can be read only once; give a file.")
            stream.seek(0)
        other = copy(self)
        other.notices = Notices()
        return other

    def _read(self, file: SourceFile) -> Iterator[Parsed]:
        blocks = self._stream() if file.uri is None else None
        return file.format.read(file, blocks, self.columns, self.item_bytes, self.notices)

    def _stream(self) -> Iterator[bytes]:
        return without_mark(self._hashed(self._stdin or sys.stdin.buffer), STDIN)

    def _hashed(self, stream: BinaryIO) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for block in read_blocks(stream):
            digest.update(block)
            yield block
        self.stream_sha256 = digest.hexdigest()
