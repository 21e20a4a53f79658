"""Shared copies of a wheel's programs for servers that root starts: one copy per version for all homes.

Root owns them, and nobody else may write to them; every account may read and run them.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import ServerFailed
from pipeline.embedded.processes import processes_from

#: Everything that vectormill keeps for root: `programs`, and a folder for each home.
ROOTS_FOLDER = Path("/var/lib/vectormill")
_PROGRAMS = "programs"
_STAGING = ".new-"


def shared_programs(installed: Path, version: str) -> Path:
    """Return the path of an installed package's copy, even if it hasn't been made."""
    return ROOTS_FOLDER / _PROGRAMS / f"{installed.name}-{version}" / installed.name


def share_programs(installed: Path, version: str) -> None:
    """Copy a package's programs and libraries, with their relative paths, unless there is a copy.

    Copies of other versions that no process runs from are removed; a home that needs one makes it again.

    Raises:
        ServerFailed: somebody other than root could change the programs, or they can't be copied.
    """
    make_roots_folder()
    copy = shared_programs(installed, version).parent
    with _alone(make_closed_folder(copy.parent)):
        if not copy.exists():
            _remove_unused(copy.parent)
            _copy(installed, copy)
        _check_closed(copy)


def remove_unused_programs() -> None:
    """Remove all copies that no process runs from, if none of root's homes has data any more."""
    folder = ROOTS_FOLDER / _PROGRAMS
    if folder.is_dir() and [each.name for each in ROOTS_FOLDER.iterdir()] == [_PROGRAMS]:
        with _alone(folder):
            _remove_unused(folder)


def make_roots_folder() -> None:
    """Create the folder of everything that is kept for root.

    Raises:
        ServerFailed: it can't be created, or somebody other than root may write to it.
    """
    make_closed_folder(ROOTS_FOLDER)


def make_closed_folder(folder: Path) -> Path:
    """Create a folder that everybody may read and only root may write to, regardless of the umask.

    Raises:
        ServerFailed: it can't be created, or somebody other than root may write to it.
    """
    try:
        folder.mkdir()
        folder.chmod(0o755)
    except FileExistsError:
        _check_closed(folder)
    except OSError as error:
        raise ServerFailed(
            f"{folder} can't be made: {error.strerror}. Postgres doesn't run as root; its programs and data go there. "
            "Run vectormill as another user, or set VECTORMILL_DATABASE_URL."
        ) from error
    return folder


def _check_closed(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise ServerFailed(f"{folder} must be a folder that only root can write to.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock on the copies for the length of the block, and first remove unfinished ones."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for staging in folder.glob(f"{_STAGING}*"):
            shutil.rmtree(staging, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    for copy in list(folder.iterdir()):
        if not processes_from(copy):
            # Under its own name, half a copy would be taken for a whole one; the next lock holder removes this name.
            doomed = copy.with_name(f"{_STAGING}{copy.name}")
            copy.rename(doomed)
            shutil.rmtree(doomed)


def _copy(installed: Path, copy: Path) -> None:
    staging = Path(tempfile.mkdtemp(dir=copy.parent, prefix=_STAGING))
    try:
        skip = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
        shutil.copytree(installed, staging / installed.name, symlinks=True, ignore=skip)
        libraries = installed.with_name(f"{installed.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, staging / libraries.name, symlinks=True)
        _make_readable(staging)
        staging.rename(copy)
    except (OSError, shutil.Error) as error:
        raise ServerFailed(f"the programs of {installed.name} can't be copied to {copy}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Set the modes of a tree that we made, so that neither the umask nor the wheel's installation decides them."""
    for parent, _, files in os.walk(folder):
        os.chmod(parent, 0o755)  # noqa: S103  # nosec B103
        for file in files:
            path = Path(parent, file)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
