"""Local files.

Not obstore's local store: it doesn't flush to disk before it renames, which a commit relies on, and its versions
change when a file is copied back from a backup. See docs/explanation/decisions/0018.
"""

import io
import os
import shutil
import stat as modes
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from pipeline.core.errors import StorageRefused
from pipeline.infra.storage.common import Stat, changed, gone, reported

#: Read at once; the file's version is checked after each.
_READ_BYTES = 1024 * 1024


def stat(path: str) -> Stat:
    """Return a file's version and size."""
    return _stat_of(os.path.abspath(path), os.stat(path))


def _stat_of(path: str, found: os.stat_result) -> Stat:
    return Stat(path, f"{found.st_size}-{found.st_mtime_ns}", found.st_size)


def below(folder: str) -> Iterator[tuple[str, Stat]]:
    """Yield the regular files below a folder, with their names relative to it; hidden folders aren't entered."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name[:1] not in ("_", ".")]
        for name in names:
            path = os.path.join(parent, name)
            # A hidden file isn't looked at: it may be a dangling link or another's.
            if name[:1] not in ("_", ".") and modes.S_ISREG((found := os.stat(path)).st_mode):
                yield os.path.relpath(path, folder), _stat_of(os.path.abspath(path), found)


def _raise(error: OSError) -> None:
    raise error


def names_below(folder: str) -> Iterator[str]:
    """Yield the names of all files below a folder, relative to it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(parent, name), folder)


def open_file(path: str, etag: str, read_bytes: int | None) -> BinaryIO:
    """Open a file whose version is checked at each read."""
    return io.BufferedReader(_LocalFile(path, etag), read_bytes or _READ_BYTES)


class _LocalFile(io.RawIOBase):
    def __init__(self, path: str, etag: str) -> None:
        self._path, self._etag = path, etag
        with reported(path):
            try:
                self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            except (FileNotFoundError, NotADirectoryError):
                raise gone(path) from None
        self._check()

    def _check(self) -> None:
        # The path is looked at, not the open file: another file may have been put in its place.
        with reported(self._path):
            try:
                now = stat(self._path)
            except (FileNotFoundError, NotADirectoryError):
                raise gone(self._path) from None
        if now.etag != self._etag:
            raise changed(self._path)

    def readinto(self, buffer: Any) -> int:
        with reported(self._path):
            count = self._file.readinto(buffer) or 0
        self._check()
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


def write(path: str, data: bytes | memoryview | BinaryIO) -> None:
    """Write a file beside its place, flush it to disk and rename it."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise StorageRefused(f"{path}: there is a file where a folder must be.") from None
    if data == b"":  # whole as soon as it is there
        target.write_bytes(data)
        return
    with NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            if isinstance(data, bytes | memoryview):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, _READ_BYTES)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


@cache
def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def move(source: str, target: str) -> None:
    """Rename a file, making the target's folder first."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(source, target)


def delete(path: str) -> None:
    """Delete a file."""
    os.unlink(path)


def delete_folder(path: str) -> None:
    """Delete a folder with all that is in it, and its parent if that is empty then."""
    shutil.rmtree(path)
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))
