"""Nouns and errors that local files and objects share."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from obstore import exceptions as refusals

from pipeline.core.errors import SourceChanged, StorageRefused, StorageUnreachable

#: A person must fix that first: to write again would only cost embedding again.
_DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True, slots=True)
class Stat:
    """Version and size of a file."""

    #: Absolute path, or URI.
    uri: str
    #: Changes when the bytes do: an object's ETag; size and time of a local file.
    etag: str
    bytes: int


def gone(uri: str) -> SourceChanged:
    """Return the error for a file that was deleted after it had been listed."""
    return SourceChanged(f"{uri}: the file was there when the job was made and is gone; submit it again.")


def changed(uri: str) -> SourceChanged:
    """Return the error for a file that was replaced after it had been listed."""
    return SourceChanged(f"{uri}: the file changed after it was listed; submit it again.")


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turn a storage's exceptions into errors of ours. A missing file is left to the caller.

    Raises:
        StorageRefused: a person must act: credentials, permissions, a full disk.
        StorageUnreachable: it may pass by itself.
    """
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
            raise StorageRefused(f"{uri}: {reason}; make room, or fix the disk.") from error
        raise StorageUnreachable(f"{uri}: {reason}.") from error


def _lacks_credentials(error: Exception) -> bool:
    # Without credentials the clients ask for those of the cloud machine that they might run on.
    said = str(error)
    return any(
        sign in said for sign in ("Missing AccessKeyId", "/latest/api/token", "169.254.169.254", "metadata.google")
    )
