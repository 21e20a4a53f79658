"""Disk of a fixed size that can be filled: a file system in memory, which only root can mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd


@dataclass(frozen=True)
class Disk:
    """Small disk, mounted at `root`."""

    root: Path

    @property
    def folder(self) -> Path:
        """Folder on the disk for the data that it holds."""
        return self.root / "used"

    def fill(self) -> None:
        """Fill the disk completely, or again if something has been deleted since."""
        with (self.root / "ballast").open("ab") as file:
            size, step = file.tell(), 1 << 30
            while step >= 4096:  # other processes take space meanwhile
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                except OSError:
                    step //= 2
                else:
                    size += step

    def clear(self) -> None:
        """Free the space that `fill` took."""
        (self.root / "ballast").unlink(missing_ok=True)


@contextmanager
def small_disk(root: Path, size_bytes: int, owner: struct_passwd | None) -> Iterator[Disk]:
    """Mount a disk for as long as the block lasts, with a folder that belongs to `owner`."""
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
