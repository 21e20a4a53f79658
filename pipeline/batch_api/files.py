"""Files of the Files API: what callers upload for batch requests, and what these answer with."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from sqlalchemy import Engine, RowMapping
from uuid_utils.compat import uuid7

from pipeline.core.errors import SourceChanged, StorageUnreachable
from pipeline.db import files
from pipeline.infra import storage
from pipeline.infra.settings import Settings

_BLOCK_BYTES = 1024 * 1024
_DAY_SECONDS = 86_400


def new_id(prefix: str) -> str:
    """An id that sorts by the time of its making."""
    made: UUID = uuid7()
    return f"{prefix}{made.hex}"


def keep(
    engine: Engine,
    settings: Settings,
    workspace_id: int,
    *,
    purpose: str,
    name: str,
    source: BinaryIO,
    lives_seconds: float | None = None,
) -> RowMapping:
    """Keep a file, read from its beginning. Returns its row.

    Raises:
        StorageRefused, StorageUnreachable: it can't be written.
    """
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    source.seek(0)
    file_id = new_id("file-")
    uri = storage.join(storage.join(settings.files_folder, str(workspace_id)), file_id)
    storage.write_from(uri, source)
    try:
        there = storage.stat(uri)
        if there is None or there.bytes != size:
            raise StorageUnreachable(f"{uri}: the file isn't there as it was written; try again.")
        row: dict[str, Any] = {
            "id": file_id,
            "workspace_id": workspace_id,
            "purpose": purpose,
            "name": name,
            "uri": there.uri,
            "etag": there.etag,
            "bytes": size,
            "sha256": digest.hexdigest(),
        }
        with engine.begin() as connection:
            return files.insert(connection, row, lives_seconds or settings.file_days * _DAY_SECONDS)
    except BaseException:
        storage.delete(uri)
        raise


def open_kept(file: RowMapping) -> BinaryIO:
    """A file's bytes.

    Raises:
        SourceChanged: they are gone, or others by now.
        StorageRefused, StorageUnreachable
    """
    uri: str = file["uri"]
    try:
        return storage.open_file(uri, file["etag"])
    except SourceChanged:
        # No file is deleted with its folder: where that is missing, what it is mounted from is away.
        if not storage.is_remote(uri) and not Path(uri).parent.is_dir():
            raise StorageUnreachable(f"{uri}: its folder is missing; mount it again.") from None
        raise


def forget(engine: Engine, file_id: str) -> bool:
    """Delete a file: its bytes first, so that none is left that nobody knows of. False: there was none."""
    with engine.begin() as connection:
        uri = files.uri_of(connection, file_id)
    if uri is None:
        return False
    storage.delete(uri)
    with engine.begin() as connection:
        return files.delete(connection, file_id)
