"""Files of the Files API: uploaded input files of batch requests, and their output and error files."""

import codecs
import hashlib
import json
from collections.abc import Set
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import UUID

import orjson
from sqlalchemy import Engine, RowMapping
from uuid_utils.compat import uuid7

from pipeline.core.errors import SourceChanged, StorageUnreachable, Waiting
from pipeline.db import files
from pipeline.infra import storage
from pipeline.infra.settings import Settings

_BLOCK_BYTES = 1024 * 1024
_FILES_AT_ONCE = 1_000
#: Life of a copy that never counts, as its maker died.
_LIVES_SECONDS = 3_600.0
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


def erase_keys(engine: Engine, settings: Settings, workspace_id: int, keys: Set[str]) -> None:
    """Write the files of a workspace anew that have lines with one of these keys as `custom_id`, without those.

    Raises:
        Waiting: a batch request that reads one of them hasn't ended. The others are done.
        StorageRefused, StorageUnreachable: one can't be read or written.
    """
    after, waiting = None, None
    while True:
        with engine.begin() as connection:
            page = files.page(
                connection, workspace_id, purpose=None, after=after, oldest_first=True, limit=_FILES_AT_ONCE
            )
        if not page:  # also of files that came meanwhile
            break
        for file in page:
            try:
                _erase_from(engine, settings, file, keys)
            except Waiting as error:
                waiting = error
            after = file["id"]
    if waiting:
        raise waiting


def _erase_from(engine: Engine, settings: Settings, file: RowMapping, keys: Set[str]) -> None:
    if (there := storage.stat(file["uri"])) is None:
        return  # it is deleted
    with TemporaryFile() as left:
        digest, size, fewer = hashlib.sha256(), 0, False
        # As it is there, even if it isn't as it was kept: keys go.
        with storage.open_file(there.uri, there.etag) as source:
            for number, line in enumerate(source):
                if _key_of(line if number else line.removeprefix(codecs.BOM_UTF8)) in keys:
                    fewer = True
                    continue
                left.write(line)
                digest.update(line)
                size += len(line)
        if not fewer:
            return
        left.seek(0)
        about = {"purpose": file["purpose"], "name": file["name"], "lives_seconds": _LIVES_SECONDS}
        kept = keep(engine, settings, file["workspace_id"], source=left, **about)
    with engine.begin() as connection:
        reading = files.reading(connection, file["id"])
        # Bytes that don't count are those of a file that has expired, so they are deleted whatever happens here.
        exchanged = not reading and files.exchange(connection, file["id"], kept["id"])
        files.expire(connection, [kept["id"]])
    if not reading and not exchanged:
        raise Waiting(f"file {file['id']} has been deleted just now")
    if reading:
        raise Waiting(f"batch request {reading} reads a file that has such a key")


def _key_of(line: bytes) -> str:
    """Return the key of a line, also of one that the reader refuses; empty: it has none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            return ""
    key = row.get("custom_id") if isinstance(row, dict) else None
    return key if isinstance(key, str) else ""
