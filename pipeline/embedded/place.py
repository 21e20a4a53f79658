"""Location of an embedded Postgres: its data folder, and the account that it runs as.

For a normal user, the data are in the home, and the wheel's programs run from their place. Postgres refuses to run as
root: then the data are under `/var/lib/vectormill/<hash of home>/`, and an existing unprivileged account runs a copy of
the programs that all homes share. No other folder's permissions change: that account needs neither root's home nor the
checkout.
"""

import hashlib
import os
import pwd
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import Self

from pipeline.core.errors import ServerFailed
from pipeline.embedded.files import make_folder, write_private
from pipeline.embedded.programs import ROOTS_FOLDER, make_roots_folder, share_programs, shared_programs

_ACCOUNTS = ("postgres", "nobody")
_STAGING = ".new-"


@dataclass(frozen=True)
class Place:
    """The folder that holds `data`, and the account that owns both; `None`: the current user does."""

    folder: Path
    account: struct_passwd | None

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """Return the place of a home, without creating anything.

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
        """Return the package's folder from which programs run: the installed one, or the shared copy."""
        return installed if self.account is None else shared_programs(installed, version)

    def prepare(self, installed: Path, version: str) -> None:
        """Create the folder, remove what an interrupted start left, and copy the programs if necessary."""
        if self.account is None:
            make_folder(self.folder)
        else:
            make_roots_folder()
            self._make_owned_folder()
            share_programs(installed, version)
            for own_copy in self.folder.glob("server-*"):  # from versions in which each home had a copy
                shutil.rmtree(own_copy)
        for staging in self._stagings():
            shutil.rmtree(staging, ignore_errors=True)

    def remains(self) -> list[Path]:
        """Return the folders that exist: the place's own, and unfinished ones beside it."""
        return [each for each in (self.folder, *self._stagings()) if each.exists()]

    def _stagings(self) -> list[Path]:
        return list(self.folder.parent.glob(f"{self.folder.name}{_STAGING}*"))

    def make_staging(self) -> Path:
        """Create a staging folder beside this one, in the same parent: nobody else can swap it for a link."""
        return Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f"{self.folder.name}{_STAGING}"))

    def write_owned(self, path: Path, text: str) -> None:
        """Write a file that only the account may read."""
        write_private(path, text)
        self.give(path)

    def give(self, path: Path) -> None:
        """Make the account the owner of a file or folder."""
        if self.account is not None:
            os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)

    def _make_owned_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.lstat().st_uid == 0:
            self.give(self.folder)


def _owner(folder: Path) -> struct_passwd | None:
    """Return the account of an earlier start, which keeps the data; `None`: there is none, or root owns the folder."""
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
