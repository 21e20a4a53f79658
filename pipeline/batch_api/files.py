"""Files of the Files API: uploaded input files of batch requests, and their output and error files."""

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
    """Return a new id with a prefix; ids sort by their time of creation (UUIDv7)."""
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
    """Store a file and return its row. `source` stands at its beginning.

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
            raise StorageUnreachable(
                f"{uri}: the stored file is missing or has another size than was written; try again."
            )
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
    """Open a stored file.

    Raises:
        SourceChanged: its bytes are gone, or have changed.
        StorageRefused, StorageUnreachable: it can't be read now.
    """
    uri: str = file["uri"]
    try:
        return storage.open_file(uri, file["etag"])
    except SourceChanged:
        # Files are never deleted together with their folder: if that is missing, it isn't mounted.
        if not storage.is_remote(uri) and not Path(uri).parent.is_dir():
            raise StorageUnreachable(f"{uri}: its folder is missing; mount it again.") from None
        raise


def delete_file(engine: Engine, file_id: str) -> bool:
    """Delete a file: its bytes first, so that none are left without a row. Return False if there was no such file."""
    with engine.begin() as connection:
        uri = files.uri_of(connection, file_id)
    if uri is None:
        return False
    storage.delete(uri)
    with engine.begin() as connection:
        return files.delete(connection, file_id)
