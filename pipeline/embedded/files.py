"""Private files of a home, which only its owner may read, and the logs of child processes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.core.errors import UserError

_ROTATE_BYTES = 10 * 1024 * 1024
_TAIL_BYTES = 16 * 1024


@contextmanager
def naming_the_home(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError` that names `path` and VECTORMILL_HOME.

    Raises:
        UserError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be used: {error.strerror}. Set VECTORMILL_HOME to a folder that you may write to."
        ) from error


def make_folder(path: Path) -> Path:
    """Create the folder with mode 0700 if it is missing; an existing one keeps its mode.

    Raises:
        UserError: it can't be created.
    """
    with naming_the_home(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace the file atomically, mode 0600: a reader sees the old text or the new one, never a part.

    Raises:
        UserError: it can't be written.
    """
    make_folder(path.parent)
    with naming_the_home(path):
        _replace(path, text)


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_log(path: Path) -> BinaryIO:
    """Open a log for appending, mode 0600. A log over 10 MiB is rotated first: it replaces `<name>.1`.

    Raises:
        UserError: it can't be opened.
    """
    make_folder(path.parent)
    with naming_the_home(path):
        if path.exists() and path.stat().st_size > _ROTATE_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)


def written_since(path: Path, begin: int) -> str:
    """Return a log's text from byte `begin` on, at most its last 16 KiB; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(begin, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def log_end(path: Path, begin: int, count: int = 15) -> str:
    """Return a log's path and its last lines from byte `begin` on, as the end of an error message."""
    lines = written_since(path, begin).splitlines()[-count:]
    if not any(lines):
        return f"It wrote nothing to its log, {path}."
    return "\n".join((f"Its log is {path}, which ends:", *lines))
