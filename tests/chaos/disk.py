"""A disk that can be filled: a file system in memory, of a size. Only root can have one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd


@dataclass(frozen=True)
class Disk:
    """Where it is mounted, and the folder in it that is used."""

    root: Path

    @property
    def folder(self) -> Path:
        """What is used of it."""
        return self.root / "used"

    def fill(self) -> None:
        """Leave no byte."""
        with (self.root / "ballast").open("wb") as file:
            size, step = 0, 1 << 30
            while step >= 4096:  # others take of it meanwhile
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                except OSError:
                    step //= 2
                else:
                    size += step

    def clear(self) -> None:
        """As it was before."""
        (self.root / "ballast").unlink(missing_ok=True)


@contextmanager
def small_disk(root: Path, size_bytes: int, owner: struct_passwd | None) -> Iterator[Disk]:
    """A disk for as long as the block lasts, which belongs to `owner`."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0711", "tmpfs", str(root)], check=True)
    try:
        disk = Disk(root)
        disk.folder.mkdir(mode=0o700)
        if owner:
            os.chown(disk.folder, owner.pw_uid, owner.pw_gid)
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
