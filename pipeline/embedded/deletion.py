"""Deletion of a home's data."""

import os
import shutil
import stat
from contextlib import suppress
from itertools import chain
from pathlib import Path

from pipeline.core.errors import ServerFailed, UserError
from pipeline.embedded.place import Place
from pipeline.embedded.processes import processes_in
from pipeline.embedded.programs import remove_unused_programs

#: Folders that vectormill makes in a home. A home may hold other things too; those stay.
_OWN = ("postgres", "valkey", "files", "demo", "logs", "run")

_SERVER = "postgres"


def data_folders(home: Path) -> list[Path]:
    """Return the folders that hold a home's data."""
    own = [home / name for name in _OWN if (home / name).exists()]
    return [*own, *(each for each in Place.of_home(home).remains() if each not in own)]


def size_bytes(folders: list[Path]) -> int:
    """Return the total size of the regular files in the folders, in bytes."""
    total = 0
    for parent, _, names in chain.from_iterable(map(os.walk, folders)):
        for name in names:
            with suppress(FileNotFoundError):  # a running server removes files
                found = os.lstat(os.path.join(parent, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def delete_data(home: Path) -> None:
    """Delete a home's data, and with the last of root's homes also the programs that these share.

    The caller must hold the home's lock (`hold_home`) and have stopped its processes.

    Raises:
        UserError: a folder is a symbolic link; nothing has been deleted.
        ServerFailed: a server still works on the data; nothing has been deleted.
    """
    place, folders = Place.of_home(home), data_folders(home)
    if links := [folder for folder in folders if folder.is_symlink()]:
        raise UserError(f"{links[0]} is a link: delete what it points to, and the link, yourself.")
    if place.data.exists() and (servers := processes_in(place.data, _SERVER)):
        raise ServerFailed(f"Postgres still works on {place.data} (process {servers[0].pid}); nothing was deleted.")
    for folder in folders:
        shutil.rmtree(folder)
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()
    if place.account is not None:
        remove_unused_programs()
