"""Storage of files where they are: local paths, and objects at s3://, gs:// and az:// URIs.

Credentials come from the environment alone, by the names that each provider's own tools use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.core.errors import SourceChanged, UserError
from pipeline.infra.storage import local, objects
from pipeline.infra.storage.common import Stat, reported

__all__ = [
    "SCHEMES",
    "Stat",
    "absolute",
    "below",
    "delete",
    "delete_folder",
    "is_remote",
    "join",
    "move",
    "names_below",
    "open_file",
    "stat",
    "write",
    "write_from",
]

SCHEMES = ("s3", "gs", "az")


class _Store(Protocol):
    """Operations on one kind of storage. A missing file is a `FileNotFoundError` of the operation."""

    def stat(self, uri: str, /) -> Stat: ...
    def below(self, uri: str, /) -> Iterator[tuple[str, Stat]]: ...
    def names_below(self, uri: str, /) -> Iterator[str]: ...
    def open_file(self, uri: str, etag: str, read_bytes: int | None, /) -> BinaryIO: ...
    def write(self, uri: str, data: bytes | memoryview | BinaryIO, /) -> None: ...
    def move(self, source: str, target: str, /) -> None: ...
    def delete(self, uri: str, /) -> None: ...
    def delete_folder(self, uri: str, /) -> None: ...


def is_remote(uri: str) -> bool:
    """Return True if `uri` names an object, rather than a local path.

    Raises:
        UserError: it has a scheme that isn't known.
    """
    scheme, marked, _ = uri.partition("://")
    if not marked or not scheme.isalnum():
        return False
    if scheme.lower() not in SCHEMES:
        raise UserError(f"{uri}: {scheme}:// isn't known; use a local path, s3://, gs:// or az://.")
    return True


def _store_of(uri: str) -> _Store:
    return objects if is_remote(uri) else local


def absolute(folder: str) -> str:
    """Return the address of a folder, whatever the working folder is where it is used."""
    return folder if is_remote(folder) else str(Path(folder).absolute())


def join(folder: str, name: str) -> str:
    """Return the URI of `name` within a folder."""
    return f"{folder.rstrip('/')}/{name}"


def stat(uri: str) -> Stat | None:
    """Return the file's size and version as they are now, or `None` if there is no such file.

    Raises:
        StorageRefused, StorageUnreachable, UserError
    """
    with reported(uri):
        try:
            return _store_of(uri).stat(uri)
        except (FileNotFoundError, NotADirectoryError):
            return None


def below(uri: str) -> Iterator[Stat]:
    """Yield every file below a folder or prefix in no particular order, but for hidden files and folders.

    Hidden are names that begin with a dot or an underscore.
    """
    with reported(uri):
        for name, found in _store_of(uri).below(uri):
            if not any(part[:1] in ("_", ".") for part in name.split("/")):
                yield found


def names_below(uri: str) -> Iterator[str]:
    """Yield the name of every file below a folder or prefix, relative to it, hidden or not."""
    with reported(uri):
        yield from _store_of(uri).names_below(uri)


def open_file(uri: str, etag: str, read_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading, seekable, as long as its version is `etag`.

    Args:
        read_bytes: bytes read at once, from disk or in one request; by default what suits a reader of the whole file.

    Raises, also at a later read:
        SourceChanged: it is gone, or another version by now.
        StorageRefused, StorageUnreachable
    """
    return _store_of(uri).open_file(uri, etag, read_bytes)


def write(uri: str, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all, over one that is there.

    Raises:
        StorageRefused, StorageUnreachable: it isn't written.
    """
    with reported(uri):
        _store_of(uri).write(uri, data)


def write_from(uri: str, source: BinaryIO) -> None:
    """Write a file of any size as `write` does, from one that is open at its beginning.

    Raises:
        StorageRefused, StorageUnreachable: it isn't written.
    """
    with reported(uri):
        _store_of(uri).write(uri, source)


def move(source: str, target: str) -> None:
    """Move a file within its bucket or file system. A missing source is fine if the target is there.

    Raises:
        SourceChanged: neither is there.
        StorageRefused, StorageUnreachable
    """
    with reported(source):
        try:
            _store_of(source).move(source, target)
        except FileNotFoundError:
            if stat(target) is None:
                raise SourceChanged(f"{source}: the file is gone before it could be moved to {target}.") from None


def delete(uri: str) -> None:
    """Delete a file, if it is there."""
    with reported(uri):
        try:
            _store_of(uri).delete(uri)
        except (FileNotFoundError, NotADirectoryError):
            return


def delete_folder(uri: str) -> None:
    """Delete a folder with everything below it, and its parent folder if that is empty then."""
    with reported(uri):
        try:
            _store_of(uri).delete_folder(uri)
        except FileNotFoundError:
            return
