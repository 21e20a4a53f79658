"""Discovery of a corpus's files from SOURCE arguments, in order."""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence

from pipeline.core.errors import SourceError
from pipeline.infra import storage
from pipeline.infra.storage import Stat
from pipeline.sources.formats import FORMATS, JSONL
from pipeline.sources.patterns import Pattern, first_glob, is_glob
from pipeline.sources.source_file import STDIN, Compression, Format, SourceFile, reason

_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD}


_ENDINGS = {ending: kind for kind in FORMATS for ending in kind.endings}
_READ = f"{', '.join([*_ENDINGS][:-1])} and {[*_ENDINGS][-1]}"
_NOT_PACKED = " and ".join(kind.endings[0] for kind in FORMATS if not kind.packable)
_KINDS = f"{_READ} are read, all but {_NOT_PACKED} also with .gz or .zst"
#: Most names that are compared with a pattern.
_MOST_ENTRIES = 5_000_000
#: Characters that can't appear in a message or in Postgres: control characters, and invalid UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """Return the files that SOURCE arguments stand for, in the order given; those of a folder or glob sorted by name.

    Raises:
        SourceError: a source doesn't exist, is given twice, or is of an unsupported type.
        StorageRefused, StorageUnreachable: an object can't be inspected.
    """
    files = [file for source in sources for file in _find(source)]
    seen: set[str | None] = set()
    for file in files:
        for name in filter(_UNFIT.search, (file.name, file.uri or "")):
            shown = _UNFIT.sub("\ufffd", name)
            raise SourceError(f"{shown}: a control character, or no UTF-8, in the name; rename it.")
        if file.uri in seen:
            raise SourceError(f"{file.name}: given twice.")
        seen.add(file.uri)
    return files


def source_file(uri: str, etag: str, size_bytes: int) -> SourceFile:
    """Return the file that a job has recorded."""
    kind = _kind(uri)
    assert kind, "a recorded file is of a kind that is read"
    return _source_file(uri, kind, Stat(uri, etag, size_bytes))


def _find(source: str) -> list[SourceFile]:
    if not source:
        raise SourceError("a source is empty; give files, a folder, or - for standard input.")
    if source == "-":
        return [
            SourceFile(
                name=STDIN,
                uri=None,
                format=JSONL,
                compression=Compression.NONE,
                bytes=None,
                etag=None,
            )
        ]
    if storage.is_remote(source):
        return _find_remote(source)
    if os.path.isdir(source):
        return _find_in_folder(source)
    if is_glob(source) and not os.path.exists(source):
        return _find_matching(source)
    kind = _kind(source)
    # A missing path is reported first, whatever its extension.
    found = _stat(source)
    if kind is None:
        raise SourceError(f"{source}: unknown kind of file; {_KINDS}.")
    return [_source_file(source, kind, found)]


def _find_remote(source: str) -> list[SourceFile]:
    if is_glob(source):
        return _find_remote_matching(source)
    kind = _kind(source)
    found = storage.stat(source) if kind else None
    if kind and found:
        return [_source_file(source, kind, found)]
    files = _of_known_kind(storage.below(source))
    if not files:
        raise SourceError(f"{source}: no such object, nor one below it of a kind that is read; {_KINDS}.")
    return files


def _find_remote_matching(pattern: str) -> list[SourceFile]:
    scheme, _, rest = pattern.partition("://")
    folder = first_glob(rest).rpartition("/")[0]
    if not folder:
        raise SourceError(f"{pattern}: name the bucket itself; a pattern may begin after it.")
    below = Pattern(rest[len(folder) + 1 :])
    start = len(f"{scheme}://{folder}/")
    files = _of_known_kind(
        found for found in storage.below(f"{scheme}://{folder}/") if below.matches(found.uri[start:])
    )
    if not files:
        raise SourceError(f"{pattern}: no object of a kind that is read matches; {_KINDS}.")
    return files


def _of_known_kind(found: Iterable[Stat]) -> list[SourceFile]:
    known = [_source_file(each.uri, kind, each) for each in found if (kind := _kind(each.uri))]
    return sorted(known, key=lambda file: file.name)


def _find_in_folder(folder: str) -> list[SourceFile]:
    found = [(name, kind) for name in sorted(_walk(folder)) if (kind := _kind(name))]
    if not found:
        raise SourceError(f"{folder.rstrip('/')}/: no .jsonl, .csv or .parquet file in it.")
    return [_source_file(name, kind, _stat(name)) for name, kind in found]


def _find_matching(pattern: str) -> list[SourceFile]:
    folder = first_glob(pattern).rpartition("/")[0]
    start = pattern[: len(folder) + 1] if folder or pattern.startswith("/") else ""
    below = Pattern(pattern[len(start) :])
    found = [(name, kind) for name in sorted(_walk_matching(start, below)) if (kind := _kind(name))]
    if not found:
        raise SourceError(f"{pattern}: no such file, and no file of a kind that is read matches; {_KINDS}.")
    return [_source_file(name, kind, _stat(name)) for name, kind in found]


def _walk_matching(start: str, pattern: Pattern) -> Iterator[str]:
    """Yield every file below a folder whose path from there matches. Each folder is listed once for any pattern."""
    waiting = [(start, pattern.begin())]
    looked = 0
    while waiting:
        folder, state = waiting.pop()
        for entry in _entries(folder or "."):
            looked += 1
            if looked > _MOST_ENTRIES:
                raise SourceError(f"{start}: more than {_MOST_ENTRIES:,} names were looked at; give a folder nearer.")
            name, after = folder + entry.name, pattern.step(state, entry.name)
            try:
                is_file, is_folder = entry.is_file(), entry.is_dir()
            except OSError as error:  # a link to itself, or a folder without permission
                if pattern.ended(after) or pattern.goes_on(after):
                    raise SourceError(f"{name}: {reason(error)}.") from None
                continue
            if pattern.ended(after) and is_file:
                yield name
            if pattern.goes_on(after) and is_folder:
                if entry.is_symlink() and pattern.is_anywhere(after):
                    raise SourceError(f"{name}: a link to a folder isn't followed by **; name it in the pattern.")
                waiting.append((f"{name}/", after))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SourceError(f"{folder}: {reason(error)}.") from None


def _walk(folder: str) -> Iterator[str]:
    """Yield every file below a folder, except hidden files and those in hidden folders."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: {reason(error)}.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
            raise SourceError(f"{link}: a link to a folder isn't followed; give the folder that it leads to.")
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _kind(name: str) -> tuple[Format, Compression] | None:
    """Return the format and compression that a file's name tells; `None` if the format isn't supported."""
    stem, ending = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(ending, Compression.NONE)
    if compression is not Compression.NONE:
        ending = os.path.splitext(stem)[1]
    found = _ENDINGS.get(ending)
    if found is None or (not found.packable and compression is not Compression.NONE):
        return None
    return found, compression


def _stat(name: str) -> Stat:
    try:
        found = os.stat(name)
    except OSError as error:
        raise SourceError(f"{name}: {reason(error)}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{name}: not a regular file; pipe JSON lines to the standard input, named -.")
    listed = storage.stat(os.path.realpath(name))
    assert listed, "it was there a moment ago"
    return listed


def _source_file(name: str, kind: tuple[Format, Compression], found: Stat) -> SourceFile:
    return SourceFile(name=name, uri=found.uri, format=kind[0], compression=kind[1], bytes=found.bytes, etag=found.etag)
