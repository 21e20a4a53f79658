"""Collections as their users see them: found by name, with state and history."""

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from pipeline.core.collection_status import CollectionStatus, SyncStatus
from pipeline.core.errors import CollectionBusy, UnknownCollection, UserError
from pipeline.db import collections, syncs
from pipeline.db.collections import Collection
from pipeline.db.database import is_connection_lost, plain_reason


def find_collection(connection: Connection, workspace_id: int, name: str) -> Collection:
    """Return a workspace's collection.

    Raises:
        UnknownCollection: there is none of this name.
    """
    found = None if "\0" in name else collections.by_name(connection, workspace_id, name)
    if found is None:
        raise UnknownCollection(f'no collection "{name}"; vectormill collections list shows those that there are.')
    return found


def collection_status(connection: Connection, collection: Collection) -> CollectionStatus:
    """Return a collection's state."""
    return CollectionStatus(
        name=collection.name,
        view=f'vectormill."{collection.view}"',
        model=collection.model,
        dimensions=collection.dimensions,
        keys=collections.about_keys(connection, collection.version_id),
        options=dict(collection.options),
        expect_every_seconds=collection.expect_every.total_seconds() if collection.expect_every else None,
        synced_at=collections.last_synced(connection, collection.version_id),
        running=syncs.running(connection, collection.version_id),
        created_at=collection.created_at,
    )


def list_collections(connection: Connection, workspace_id: int) -> list[CollectionStatus]:
    """Return the states of a workspace's collections, by name."""
    return [collection_status(connection, each) for each in collections.of_workspace(connection, workspace_id)]


def history(connection: Connection, collection: Collection, limit: int) -> list[SyncStatus]:
    """Return a collection's newest syncs, newest first."""
    return [SyncStatus(**row) for row in collections.history(connection, collection.id, limit)]


def drop_collection(connection: Connection, collection: Collection) -> None:
    """Drop a collection with its view, vectors and history. Its jobs stay.

    Raises:
        CollectionBusy: a sync goes on.
        UserError: something depends on its view, or collections are used just now.
    """
    try:
        collections.lock(connection, collection.id)
        if job := syncs.running(connection, collection.version_id):
            raise CollectionBusy(collection.name, job)
        collections.drop(connection, collection.id)
    except DBAPIError as error:
        if is_connection_lost(error):
            raise
        raise UserError(f"collection {collection.name} can't be dropped now ({plain_reason(error)}).") from error
