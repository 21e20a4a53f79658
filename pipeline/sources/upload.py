"""Files uploaded through the API, as a corpus."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources import Corpus


@dataclass(frozen=True, slots=True)
class Upload:
    """Uploaded file, as it is kept until its rows are read."""

    #: Name that the submitter gave it.
    name: str
    path: Path
    sha256: str


class UploadedCorpus(Corpus):
    """Rows of uploaded files, which are identified by their content: the place where they are kept stays internal, and
    the same file sent again is the same corpus."""

    def __init__(self, uploads: Sequence[Upload], columns: Columns, item_bytes: int) -> None:
        """List the files. Raises as `Corpus`, with the submitter's names in place of paths."""
        try:
            super().__init__([str(upload.path) for upload in uploads], columns, item_bytes)
        except SourceError as error:
            told = error.args[0]
            for upload in uploads:
                told = told.replace(str(upload.path), upload.name)
            raise SourceError(told, field=error.field) from None
        self._uploads = uploads
        self.files = [replace(file, name=one.name) for file, one in zip(self.files, uploads, strict=True)]

    def inputs(self) -> list[dict[str, Any]]:
        """Return the inputs that the job records, one per file."""
        kept = zip(self.files, self._uploads, strict=True)
        return [{"uri": f"upload:{one.name}", "etag": one.sha256, "bytes": file.bytes} for file, one in kept]

    def fingerprint(self) -> str:
        """Return the SHA-256 over each file's hash, format and compression, and the columns."""
        files = [
            (one.sha256, file.format.name, file.compression)
            for file, one in zip(self.files, self._uploads, strict=True)
        ]
        return hashlib.sha256(json.dumps([files, self.columns.identity]).encode()).hexdigest()
