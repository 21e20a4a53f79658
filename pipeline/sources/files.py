"""From SOURCE arguments to the files of a corpus, in order."""

import enum
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SourceError

STDIN = "standard input"


class Format(enum.StrEnum):
    """How a file holds its rows."""

    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"


class Compression(enum.StrEnum):
    """How a file is packed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_FORMATS = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
}
_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a corpus, as it was when the corpus was listed; or the standard input."""

    #: As the user wrote it; messages use it.
    name: str
    #: Absolute; `None` for the standard input.
    path: Path | None
    format: Format
    compression: Compression
    #: Size on disk; `None` for the standard input.
    bytes: int | None
    mtime_ns: int | None

    def check_unchanged(self) -> None:
        """Raise `SourceError` if the file is no longer the one that was listed."""
        if self.path is None:
            return
        try:
            now = self.path.stat()
        except OSError as error:
            raise SourceError(f"{self.name}: {reason(error)}.") from None
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.mtime_ns):
            raise SourceError(f"{self.name}: the file changed while it was read; submit it again.")


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files that SOURCE arguments stand for, in the order given; those of a folder sorted by name.

    Raises:
        SourceError: a source doesn't exist, is given twice, or is no kind of file that is read.
    """
    files = [file for source in sources for file in _find(source)]
    seen: set[Path | None] = set()
    for file in files:
        if file.path in seen:
            raise SourceError(f"{file.name}: given twice.")
        seen.add(file.path)
    return files


def reason(error: OSError) -> str:
    """Why the operating system refused, for the middle of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or "can't be read").lower()


def _find(source: str) -> list[SourceFile]:
    if source == "-":
        return [
            SourceFile(
                name=STDIN,
                path=None,
                format=Format.JSONL,
                compression=Compression.NONE,
                bytes=None,
                mtime_ns=None,
            )
        ]
    if os.path.isdir(source):
        return _find_in_folder(source)
    kind = _kind(source)
    # A path that isn't there is named first, whatever its ending.
    found = _stat(source)
    if kind is None:
        raise SourceError(
            f"{source}: unknown kind of file; .jsonl, .ndjson, .csv, .tsv and .parquet are read, "
            "all but .parquet also with .gz or .zst."
        )
    return [_source_file(source, kind, found)]


def _find_in_folder(folder: str) -> list[SourceFile]:
    found = [(name, kind) for name in sorted(_walk(folder)) if (kind := _kind(name))]
    if not found:
        raise SourceError(f"{folder.rstrip('/')}/: no .jsonl, .csv or .parquet file in it.")
    return [_source_file(name, kind, _stat(name)) for name, kind in found]


def _walk(folder: str) -> Iterator[str]:
    """Every file below a folder that isn't hidden, nor in a hidden folder."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: {reason(error)}.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _kind(name: str) -> tuple[Format, Compression] | None:
    """What a file's name says about it; `None` where that kind isn't read."""
    stem, ending = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(ending, Compression.NONE)
    if compression is not Compression.NONE:
        ending = os.path.splitext(stem)[1]
    found = _FORMATS.get(ending)
    if found is None or (found is Format.PARQUET and compression is not Compression.NONE):
        return None
    return found, compression


def _stat(name: str) -> os.stat_result:
    try:
        found = os.stat(name)
    except OSError as error:
        raise SourceError(f"{name}: {reason(error)}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{name}: not a regular file; pipe JSON lines to the standard input, named -.")
    return found


def _source_file(name: str, kind: tuple[Format, Compression], found: os.stat_result) -> SourceFile:
    return SourceFile(
        name=name,
        path=Path(name).resolve(),
        format=kind[0],
        compression=kind[1],
        bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
    )
