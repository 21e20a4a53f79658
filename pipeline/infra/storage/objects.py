"""Objects of S3, Google Cloud Storage and Azure, through obstore."""

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as refusals
from obstore.store import from_url

from pipeline.core.errors import UserError
from pipeline.infra.storage.common import Stat, changed, gone, reported

#: Asked for at once.
_READ_BYTES = 4 * 1024 * 1024
_CLIENT: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}
_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}


def stat(uri: str) -> Stat:
    """Return an object's version and size."""
    bucket, path = _split(uri)
    return _stat_of(uri, obstore.head(_store(bucket), path))


def _stat_of(uri: str, found: Any) -> Stat:
    # A server without ETags: size and time, as of a local file.
    etag = found["e_tag"] or f"{found['size']}-{found['last_modified'].isoformat()}"
    return Stat(uri, etag, found["size"])


def below(uri: str) -> Iterator[tuple[str, Stat]]:
    """Yield the objects below a prefix, with their names relative to it."""
    bucket, prefix = _prefix(uri)
    for page in obstore.list(_store(bucket), prefix=prefix or None):
        for found in page:
            name = str(found["path"]).removeprefix(prefix).lstrip("/")
            if name:
                yield name, _stat_of(f"{bucket}/{found['path']}", found)


def names_below(uri: str) -> Iterator[str]:
    """Yield the names of all objects below a prefix, relative to it."""
    bucket, prefix = _prefix(uri)
    for page in obstore.list(_store(bucket), prefix=prefix or None):
        for found in page:
            yield str(found["path"]).removeprefix(prefix).lstrip("/")


def open_file(uri: str, etag: str, read_bytes: int | None) -> BinaryIO:
    """Open an object, each read of which asks for the version `etag`."""
    return io.BufferedReader(_Object(uri, etag), read_bytes or _READ_BYTES)


class _Object(io.RawIOBase):
    def __init__(self, uri: str, etag: str) -> None:
        self._uri, self._etag, self._at = uri, etag, 0
        bucket, self._path = _split(uri)
        with reported(uri):
            self._store = _store(bucket)
            try:
                now = stat(uri)
            except FileNotFoundError:
                raise gone(uri) from None
        if now.etag != etag:
            raise changed(uri)
        self._size = now.bytes

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with reported(self._uri):
            try:
                options: Any = {"range": (self._at, end), "if_match": self._etag}
                data = obstore.get(self._store, self._path, options=options).bytes()
            except FileNotFoundError:
                raise gone(self._uri) from None
            except refusals.PreconditionError:
                raise changed(self._uri) from None
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


def write(uri: str, data: bytes | memoryview | BinaryIO) -> None:
    """Put an object, in several requests if it comes from a file."""
    bucket, path = _split(uri)
    if isinstance(data, bytes | memoryview):
        obstore.put(_store(bucket), path, bytes(data), use_multipart=False)
    else:
        obstore.put(_store(bucket), path, data, use_multipart=True)


def move(source: str, target: str) -> None:
    """Rename an object within its bucket."""
    bucket, path = _split(source)
    obstore.rename(_store(bucket), path, _split(target)[1])


def delete(uri: str) -> None:
    """Delete an object."""
    bucket, path = _split(uri)
    obstore.delete(_store(bucket), path)


def delete_folder(uri: str) -> None:
    """Delete all objects below a prefix: folders are but parts of names here."""
    for name in list(names_below(uri)):
        with suppress(FileNotFoundError):
            delete(f"{uri.rstrip('/')}/{name}")


def _prefix(uri: str) -> tuple[str, str]:
    bucket, path = _split(uri)
    return bucket, path.rstrip("/")


def _split(uri: str) -> tuple[str, str]:
    """Return a URI's bucket, with its scheme, and path."""
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
