"""Source of keys to remove from a collection: a text file with one key a line."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.source_file import reason
from pipeline.sources.validation import BLOCK_ROWS, Notices, Rows
from pipeline.sources.values import BadKeyError, as_key

#: Column of its rows that says that their keys go.
REMOVED = "vectormill: this key goes"


class RemovedKeys:
    """Rows that only say that their key goes."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self.columns = columns
        self.item_bytes = 0
        self.notices = Notices()

    @property
    def name(self) -> str:
        """The file."""
        return str(self._path)

    def inputs(self) -> list[dict[str, Any]]:
        """Return the file, as an input of the job."""
        return [{"uri": str(self._path.absolute()), "etag": None, "bytes": None}]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file."""
        try:
            with self._path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    def read_fingerprint(self) -> str:
        """Return the fingerprint."""
        return self.fingerprint()

    def blocks(self) -> Iterator[Rows]:
        """Yield a row for each key, in order. Empty lines are skipped.

        Raises:
            SourceError: the file can't be read, or a line is no key.
        """
        number = 0
        try:
            with self._path.open(encoding="utf-8-sig") as file:
                while lines := list(islice(file, BLOCK_ROWS)):
                    keys = [self._key(line, at) for at, line in enumerate(lines, number + 1) if line.strip()]
                    number += len(lines)
                    flags = [b'{"%s":true}' % REMOVED.encode()] * len(keys)
                    yield Rows(list(keys), [None] * len(keys), [], flags)
        except OSError as error:
            raise self._unreadable(error) from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.name}: it isn't UTF-8; write one key a line.") from error

    def again(self) -> "RemovedKeys":
        """Return the same source, to be read once more."""
        return RemovedKeys(self._path, self.columns)

    def _key(self, line: str, number: int) -> str:
        try:
            return as_key(line.removesuffix("\n").removesuffix("\r")) or ""
        except BadKeyError as error:
            raise SourceError(f"{self.name} line {number:,}: {error}.") from error

    def _unreadable(self, error: OSError) -> SourceError:
        return SourceError(f"{self.name}: {reason(error)}.", field="remove_keys")
