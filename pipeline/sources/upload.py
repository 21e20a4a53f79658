"""Files that came through the api."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.sources import Columns, Corpus


@dataclass(frozen=True, slots=True)
class Upload:
    """One of them, as it is kept until its rows are read."""

    #: As its sender calls it.
    name: str
    path: Path
    sha256: str


class UploadedCorpus(Corpus):
    """The rows of uploads. They are known by their content: where they are kept is nobody's business, and the same
    file sent again is the same corpus."""

    def __init__(self, uploads: Sequence[Upload], columns: Columns, item_bytes: int) -> None:
        """List them; raises as `Corpus`."""
        super().__init__([str(upload.path) for upload in uploads], columns, item_bytes)
        self._uploads = uploads
        self.files = [replace(file, name=one.name) for file, one in zip(self.files, uploads, strict=True)]

    def inputs(self) -> list[dict[str, Any]]:
        """What the job writes down of each file."""
        kept = zip(self.files, self._uploads, strict=True)
        return [{"uri": f"upload:{one.name}", "etag": one.sha256, "bytes": file.bytes} for file, one in kept]

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of each file and the columns."""
        columns = (self.columns.text, self.columns.key, self.columns.carry)
        return hashlib.sha256(json.dumps([[one.sha256 for one in self._uploads], columns]).encode()).hexdigest()
