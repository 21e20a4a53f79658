"""Where Postgres keeps its data, and as whom it runs.

As a normal user: in the home, with the wheel's programs where they are. As root Postgres refuses to run: then
data and a copy of the programs stand under `/var/lib/vectormill/<hash of home>/`, and an account that exists
already runs it. Nobody's folders are opened for that account: it needs neither root's home nor the checkout.
"""

import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import Self

from pipeline.embedded.files import make_folder, write_private
from pipeline.errors import ServerFailed

ROOTS_FOLDER = Path("/var/lib/vectormill")
_ACCOUNTS = ("postgres", "nobody")
_STAGING = ".new-"


@dataclass(frozen=True)
class Place:
    """A folder with `data`, and the account that owns both; `None`: we do."""

    folder: Path
    account: struct_passwd | None

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """Find the place that belongs to a home. Nothing is made yet.

        Raises:
            ServerFailed: we are root, and there is no account to run as.
        """
        if os.geteuid() != 0:
            return cls(home / "postgres", None)
        folder = ROOTS_FOLDER / hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
        return cls(folder, _owner(folder) or _unprivileged_account())

    @property
    def data(self) -> Path:
        """Postgres' data folder."""
        return self.folder / "data"

    def server(self, installed: Path, version: str) -> Path:
        """Return the package's folder that programs are run from: as installed, or its copy."""
        return installed if self.account is None else self.folder / f"server-{version}" / installed.name

    def prepare(self, installed: Path, version: str) -> None:
        """Make the folder, clear what an earlier start left half done, copy the programs if need be."""
        if self.account is None:
            make_folder(self.folder)
        else:
            _make_roots_folder()
            self._make_owned_folder()
        for staging in self.folder.parent.glob(f"{self.folder.name}{_STAGING}*"):
            shutil.rmtree(staging, ignore_errors=True)
        if self.account is not None and not self.server(installed, version).exists():
            self._copy_server(installed, version)

    def make_staging(self) -> Path:
        """Make a folder beside this one. Only its owner's parent holds it: nobody can swap it for a link."""
        return Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f"{self.folder.name}{_STAGING}"))

    def write_owned(self, path: Path, text: str) -> None:
        """Write a file that only the account may read."""
        write_private(path, text)
        self.give(path)

    def give(self, path: Path) -> None:
        """Make the account the owner."""
        if self.account is not None:
            os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)

    def _make_owned_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.lstat().st_uid == 0:
            self.give(self.folder)

    def _copy_server(self, installed: Path, version: str) -> None:
        """Copy programs and libraries as they lie to each other. Root owns them, the account reads them."""
        for outdated in self.folder.glob("server-*"):
            shutil.rmtree(outdated)
        staging = self.make_staging()
        try:
            skip = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
            shutil.copytree(installed, staging / installed.name, symlinks=True, ignore=skip)
            libraries = installed.with_name(f"{installed.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, staging / libraries.name, symlinks=True)
            _make_readable(staging)
            staging.rename(self.folder / f"server-{version}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _owner(folder: Path) -> struct_passwd | None:
    """Return the account of an earlier start: data stay with it."""
    try:
        owner = folder.lstat().st_uid
    except FileNotFoundError:
        return None
    return pwd.getpwuid(owner) if owner else None


def _unprivileged_account() -> struct_passwd:
    for name in _ACCOUNTS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServerFailed(
        "Postgres doesn't run as root, and there is no account 'postgres' or 'nobody' to run it. "
        "Run vectormill as another user, or set VECTORMILL_DATABASE_URL."
    )


def _make_roots_folder() -> None:
    try:
        ROOTS_FOLDER.mkdir()
    except FileExistsError:
        found = ROOTS_FOLDER.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise ServerFailed(f"{ROOTS_FOLDER} must be a folder that only root can write to.") from None
    else:
        # The account must pass through, whatever the umask is.
        ROOTS_FOLDER.chmod(0o755)


def _make_readable(folder: Path) -> None:
    """Give a tree that we made modes which don't depend on the umask or on the wheel's installation."""
    for parent, _, files in os.walk(folder):
        os.chmod(parent, 0o755)  # noqa: S103  # nosec B103
        for file in files:
            path = Path(parent, file)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
