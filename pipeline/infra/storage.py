"""Files where they are: local paths, and objects at s3://, gs:// and az:// URIs.

Credentials come from the environment alone, by the names that each provider's own tools use.
"""

import errno
import io
import os
import shutil
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as refusals
from obstore.store import from_url

from pipeline.core.errors import SourceChanged, StorageRefused, StorageUnreachable, UserError

SCHEMES = ("s3", "gs", "az")
#: Read at once from a local file; the file is looked at again before each.
_LOCAL_BYTES = 1024 * 1024
#: Asked for at once from an object.
_REMOTE_BYTES = 4 * 1024 * 1024
#: A person must mend that first: to write again would only cost embedding again.
_DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_CLIENT: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}
_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}


@dataclass(frozen=True, slots=True)
class Stat:
    """A file as it is now."""

    #: Absolute path, or URI.
    uri: str
    #: Changes when the bytes do: an object's ETag; size and time of a local file.
    etag: str
    bytes: int


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object, rather than a local path.

    Raises:
        UserError: it has a scheme that isn't known.
    """
    scheme, marked, _ = uri.partition("://")
    if not marked or not scheme.isalnum():
        return False
    if scheme.lower() not in SCHEMES:
        raise UserError(f"{uri}: {scheme}:// isn't known; use a local path, s3://, gs:// or az://.")
    return True


def join(folder: str, name: str) -> str:
    """The URI of `name` within a folder."""
    return f"{folder.rstrip('/')}/{name}"


def stat(uri: str) -> Stat | None:
    """A file as it is now; `None` if there is none.

    Raises:
        StorageRefused, StorageUnreachable, UserError
    """
    if is_remote(uri):
        bucket, path = _split(uri)
        with _reported(uri), suppress(FileNotFoundError):
            return _stat_of(uri, obstore.head(_store(bucket), path))
        return None
    with _reported(uri), suppress(FileNotFoundError, NotADirectoryError):
        return _local_stat(os.path.abspath(uri), os.stat(uri))
    return None


def _stat_of(uri: str, found: Any) -> Stat:
    # A server without ETags: size and time, as of a local file.
    etag = found["e_tag"] or f"{found['size']}-{found['last_modified'].isoformat()}"
    return Stat(uri, etag, found["size"])


def _local_stat(path: str, found: os.stat_result) -> Stat:
    return Stat(path, f"{found.st_size}-{found.st_mtime_ns}", found.st_size)


def below(uri: str) -> Iterator[Stat]:
    """Every file below a folder or prefix that isn't hidden, nor in a hidden folder, in no certain order.

    Hidden are names that begin with a dot or an underscore.
    """
    if is_remote(uri):
        bucket, path = _split(uri)
        with _reported(uri):
            for page in obstore.list(_store(bucket), prefix=path.rstrip("/") or None):
                for found in page:
                    name = str(found["path"]).removeprefix(path.rstrip("/")).lstrip("/")
                    if name and not _is_hidden(name):
                        yield _stat_of(f"{bucket}/{found['path']}", found)
        return
    with _reported(uri):
        for parent, folders, names in os.walk(uri, onerror=_raise):
            folders[:] = [name for name in folders if not _is_hidden(name)]
            for name in names:
                path = os.path.join(parent, name)
                if not _is_hidden(name) and modes.S_ISREG((found_here := os.stat(path)).st_mode):
                    yield _local_stat(os.path.abspath(path), found_here)


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(name: str) -> bool:
    return any(part[:1] in ("_", ".") for part in name.split("/"))


def names_below(uri: str) -> Iterator[str]:
    """The names, relative to a folder or prefix, of every file below it, hidden or not."""
    if is_remote(uri):
        bucket, path = _split(uri)
        prefix = path.rstrip("/")
        with _reported(uri):
            for page in obstore.list(_store(bucket), prefix=prefix or None):
                for found in page:
                    yield str(found["path"]).removeprefix(prefix).lstrip("/")
        return
    with _reported(uri):
        for parent, _, names in os.walk(uri):
            for name in names:
                yield os.path.relpath(os.path.join(parent, name), uri)


def open_file(uri: str, etag: str) -> BinaryIO:
    """A file for reading, seekable, as long as it is what `etag` says.

    Raises, also at a later read:
        SourceChanged: it is gone, or another one by now.
        StorageRefused, StorageUnreachable
    """
    raw: io.RawIOBase = _Object(uri, etag) if is_remote(uri) else _LocalFile(uri, etag)
    return io.BufferedReader(raw, _REMOTE_BYTES if is_remote(uri) else _LOCAL_BYTES)


class _LocalFile(io.RawIOBase):
    """A local file whose size and time are checked at each read."""

    def __init__(self, path: str, etag: str) -> None:
        self._path, self._etag = path, etag
        with _reported(path):
            try:
                self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            except (FileNotFoundError, NotADirectoryError):
                raise _gone(path) from None
        self._check()

    def _check(self) -> None:
        # The path is looked at, not the open file: another file may have been put in its place.
        if (now := stat(self._path)) is None:
            raise _gone(self._path)
        if now.etag != self._etag:
            raise _changed(self._path)

    def readinto(self, buffer: Any) -> int:
        with _reported(self._path):
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


class _Object(io.RawIOBase):
    """An object whose every read asks for the version that was meant."""

    def __init__(self, uri: str, etag: str) -> None:
        self._uri, self._etag, self._at = uri, etag, 0
        bucket, self._path = _split(uri)
        with _reported(uri):
            self._store = _store(bucket)
        now = stat(uri)
        if now is None:
            raise _gone(uri)
        if now.etag != etag:
            raise _changed(uri)
        self._size = now.bytes

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with _reported(self._uri):
            try:
                options: Any = {"range": (self._at, end), "if_match": self._etag}
                data = obstore.get(self._store, self._path, options=options).bytes()
            except FileNotFoundError:
                raise _gone(self._uri) from None
            except refusals.PreconditionError:
                raise _changed(self._uri) from None
        buffer[: len(data)] = memoryview(data)
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _gone(uri: str) -> SourceChanged:
    return SourceChanged(f"{uri}: the file was there when the job was made and is gone; submit it again.")


def _changed(uri: str) -> SourceChanged:
    return SourceChanged(f"{uri}: the file changed after it was listed; submit it again.")


def read(uri: str) -> bytes | None:
    """A small file's bytes; `None` if there is none."""
    with _reported(uri), suppress(FileNotFoundError):
        if is_remote(uri):
            bucket, path = _split(uri)
            return bytes(obstore.get(_store(bucket), path).bytes())
        return Path(uri).read_bytes()
    return None


def write(uri: str, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all; one that is there is replaced.

    Raises:
        StorageRefused, StorageUnreachable: it isn't written.
    """
    with _reported(uri):
        if is_remote(uri):
            bucket, path = _split(uri)
            obstore.put(_store(bucket), path, bytes(data), use_multipart=False)
        else:
            _write_local(Path(uri), data)


def write_from(uri: str, source: BinaryIO) -> None:
    """Write a file of any size as `write` does, from one that is open at its beginning.

    Raises:
        StorageRefused, StorageUnreachable: it isn't written.
    """
    with _reported(uri):
        if is_remote(uri):
            bucket, path = _split(uri)
            obstore.put(_store(bucket), path, source, use_multipart=True)
        else:
            _write_local(Path(uri), source)


def _write_local(path: Path, data: bytes | memoryview | BinaryIO) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise StorageRefused(f"{path}: there is a file where a folder must be.") from None
    if data == b"":  # whole as soon as it is there
        path.write_bytes(data)
        return
    with NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            if isinstance(data, bytes | memoryview):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, _LOCAL_BYTES)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@cache
def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def move(source: str, target: str) -> None:
    """Move a file within its bucket or file system. A missing source is fine if the target is there.

    Raises:
        SourceChanged: neither is there.
        StorageRefused, StorageUnreachable
    """
    with _reported(source):
        try:
            if is_remote(source):
                bucket, path = _split(source)
                obstore.rename(_store(bucket), path, _split(target)[1])
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(source, target)
        except FileNotFoundError:
            if stat(target) is None:
                raise SourceChanged(f"{source}: the file is gone before it could be moved to {target}.") from None


def delete(uri: str) -> None:
    """Delete a file, if it is there."""
    with _reported(uri), suppress(FileNotFoundError, NotADirectoryError):
        if is_remote(uri):
            bucket, path = _split(uri)
            obstore.delete(_store(bucket), path)
        else:
            os.unlink(uri)


def delete_folder(uri: str) -> None:
    """Delete a folder with all that is below it, and the one that it is in, if nothing else is there."""
    if is_remote(uri):  # where folders are but parts of names
        for name in list(names_below(uri)):
            delete(join(uri, name))
        return
    with _reported(uri), suppress(FileNotFoundError):
        shutil.rmtree(uri)
        with suppress(OSError):
            os.rmdir(os.path.dirname(uri))


def _split(uri: str) -> tuple[str, str]:
    """A URI as bucket, with its scheme, and path."""
    parts = urlsplit(uri)
    if not parts.netloc or "@" in parts.netloc:
        raise UserError(f"{parts.scheme}://…: write it as {parts.scheme}://bucket/path; credentials stay outside.")
    return f"{parts.scheme.lower()}://{parts.netloc}", uri.split("://", 1)[1].partition("/")[2]


def _store(bucket: str) -> Any:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return _client_of(bucket, endpoint)


@cache
def _client_of(bucket: str, endpoint: str) -> Any:
    client: Any = dict(_CLIENT)
    config: Any = {}
    if bucket.startswith("s3://") and endpoint:
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    return from_url(bucket, client_options=client, retry_config=_RETRIES, config=config or None)


@contextmanager
def _reported(uri: str) -> Iterator[None]:
    """Say what a storage objects to as an error of ours. What is missing is left to the caller."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, refusals.PreconditionError) as error:
        if "NoSuchBucket" in str(error):
            raise StorageRefused(f"{uri}: no such bucket.") from error
        raise
    except (PermissionError, refusals.UnauthenticatedError) as error:
        raise StorageRefused(
            f"{uri}: access refused; check permissions, and credentials in the environment."
        ) from error
    except refusals.BaseError as error:
        if "NoSuchBucket" in str(error):
            raise StorageRefused(f"{uri}: no such bucket.") from error
        if _lacks_credentials(error):
            raise StorageRefused(f"{uri}: no credentials; set them in the environment.") from error
        raise StorageUnreachable(f"{uri}: the storage doesn't answer; check its address, then try again.") from error
    except OSError as error:
        reason = (error.strerror or "input or output failed").lower()
        if error.errno in _DISK_TROUBLE:
            raise StorageRefused(f"{uri}: {reason}; make room, or mend the disk.") from error
        raise StorageUnreachable(f"{uri}: {reason}.") from error


def _lacks_credentials(error: Exception) -> bool:
    # Without credentials the clients ask for those of the cloud machine that they might run on.
    said = str(error)
    return any(
        sign in said for sign in ("Missing AccessKeyId", "/latest/api/token", "169.254.169.254", "metadata.google")
    )
