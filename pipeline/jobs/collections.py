"""Collections by name, with state and history; the version that readers see."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from pipeline.core.collection_status import CollectionStatus, FilesStatus, SyncStatus, VersionStatus
from pipeline.core.collections import VersionState
from pipeline.core.errors import CollectionBusy, IllegalTransition, UnknownCollection, UserError
from pipeline.db import collection_files, collection_versions, collections, forgets, staging, syncs
from pipeline.db.collections import Collection
from pipeline.db.database import is_connection_lost, plain_reason
from pipeline.jobs import control

#: Time in which readers may go back to the version before a swap.
KEEP = timedelta(days=7)


def find_collection(connection: Connection, workspace_id: int, name: str) -> Collection:
    """Return a workspace's collection, with its current version.

    Raises:
        UnknownCollection: there is none of this name.
    """
    found = None if "\0" in name else collections.by_name(connection, workspace_id, name)
    if found is None:
        raise UnknownCollection(f'no collection "{name}"; vectormill collections list shows those that there are.')
    return found


def find_version(connection: Connection, collection: Collection, state: VersionState) -> Collection:
    """Return a collection with its version in this state.

    Raises:
        UserError: it has none.
    """
    found = collections.versions(connection, collection.id).get(state)
    if found is None:
        raise UserError(f"the collection {collection.name} has no {state} version.")
    return found


def collection_status(connection: Connection, collection: Collection) -> CollectionStatus:
    """Return a collection's state."""
    versions = collections.versions(connection, collection.id)
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
        output=_files_status(connection, collection),
        versions=[
            _version_status(connection, version, collection)
            for state, version in versions.items()
            if state is not VersionState.CURRENT
        ],
    )


def _version_status(connection: Connection, version: Collection, current: Collection) -> VersionStatus:
    return VersionStatus(
        state=version.state,
        model=version.model,
        dimensions=version.dimensions,
        keys=collections.about_keys(connection, version.version_id),
        running=syncs.running(connection, version.version_id),
        differs=_difference(connection, version, current),
        kept_until=version.kept_until,
        output=_files_status(connection, version),
    )


def _files_status(connection: Connection, version: Collection) -> FilesStatus | None:
    if version.output is None:
        return None
    found = collection_files.state(connection, version.version_id)
    return FilesStatus(
        uri=version.output,
        version=found.shown,
        files=found.files,
        rows=found.rows,
        bytes=found.bytes,
        written_at=found.written_at,
        behind=found.is_behind,
        problem=found.problem,
    )


def _difference(connection: Connection, version: Collection, current: Collection) -> str | None:
    """Return how a version differs from the current one, in a clause; `None`: it doesn't."""
    found = collection_versions.difference(connection, version.version_id, current.version_id)
    if not found.is_filled:
        return "no whole sync has reached it yet"
    return f"sync {found.missed} has reached only one of the two, or in another order" if found.missed else None


def list_collections(connection: Connection, workspace_id: int) -> list[CollectionStatus]:
    """Return the states of a workspace's collections, by name."""
    return [collection_status(connection, each) for each in collections.of_workspace(connection, workspace_id)]


def history(connection: Connection, collection: Collection, limit: int) -> list[SyncStatus]:
    """Return a collection's newest syncs, newest first."""
    return [SyncStatus(**row) for row in collections.history(connection, collection.id, limit)]


@contextmanager
def locked(connection: Connection, collection: Collection, what: str) -> Iterator[dict[VersionState, Collection]]:
    """Yield the versions of a collection, of which no sync begins meanwhile. `what`: what is done to it.

    Raises:
        UnknownCollection: it has been dropped.
        UserError: the database refuses a statement in the body, or others use a collection for two seconds.
    """
    try:
        collections.lock(connection, collection.id)
        versions = collections.versions(connection, collection.id)
        if not versions:
            raise UnknownCollection(f'no collection "{collection.name}": it has been dropped.')
        yield versions
    except DBAPIError as error:
        if is_connection_lost(error):
            raise
        raise UserError(f"collection {collection.name} can't be {what} now ({plain_reason(error)}).") from error


def drop_collection(connection: Connection, collection: Collection) -> None:
    """Drop a collection with its view, vectors and history. Its jobs stay.

    Raises:
        CollectionBusy: a sync goes on.
        UserError: something depends on its view, or collections are used just now.
    """
    with locked(connection, collection, "dropped"):
        if job := syncs.running_of(connection, collection.id):
            raise CollectionBusy(collection.name, job)
        if forget := forgets.of_collection(connection, collection.id):
            raise UserError(f"keys of it are being forgotten (request {forget}); drop it when that is done.")
        collections.drop(connection, collection.id)


def abandon_upgrade(connection: Connection, collection: Collection) -> None:
    """Let a collection's next version go, and cancel its sync.

    Raises:
        UserError: it has none.
    """
    with locked(connection, collection, "changed"):
        version = find_version(connection, collection, VersionState.NEXT)
        if job := syncs.running(connection, version.version_id):
            staging.cancel(connection, job)
            with suppress(IllegalTransition):  # it is being staged, or has ended just now
                control.cancel(connection, job)
        collection_versions.move(connection, {version.version_id: VersionState.GONE})


def swap(connection: Connection, collection: Collection, *, keep: timedelta = KEEP) -> None:
    """Let readers see a collection's next version: its view, searches, and the model that its name stands for in
    requests for embeddings change together. The current version becomes the previous one, for the time `keep`.

    Raises:
        CollectionBusy: a sync goes on.
        UserError: there is none, it lacks something of the current one, or something depends on the view whose vectors
            get another type.
    """
    if keep <= timedelta():
        raise UserError("give a time such as 7d.", field="keep")
    with locked(connection, collection, "swapped") as versions:
        current, following = versions[VersionState.CURRENT], find_version(connection, collection, VersionState.NEXT)
        if job := syncs.running_of(connection, collection.id):
            raise CollectionBusy(collection.name, job)
        if lacks := _difference(connection, following, current):
            raise UserError(f"the next version isn't ready: {lacks}; sync the collection {collection.name}, then swap.")
        moves = {current.version_id: VersionState.PREVIOUS, following.version_id: VersionState.CURRENT}
        if before := versions.get(VersionState.PREVIOUS):
            moves = {before.version_id: VersionState.GONE, **moves}
        collection_versions.move(connection, moves, keep=keep)
        collection_versions.show_current(connection, collection.id)


def swap_back(connection: Connection, collection: Collection) -> None:
    """Undo a swap: the previous version becomes the current one, whatever it lacks, and that the next one again.

    Raises:
        UserError: the previous version isn't kept any more, another upgrade goes on, or something depends on the view
            whose vectors get another type.
    """
    with locked(connection, collection, "swapped") as versions:
        current, before = versions[VersionState.CURRENT], find_version(connection, collection, VersionState.PREVIOUS)
        if other := versions.get(VersionState.NEXT):
            raise UserError(f"an upgrade to model {other.model} goes on; abandon it first.")
        moves = {current.version_id: VersionState.NEXT, before.version_id: VersionState.CURRENT}
        collection_versions.move(connection, moves)
        collection_versions.show_current(connection, collection.id)


def compact(connection: Connection, collection: Collection) -> None:
    """Let the Parquet files of a collection's versions be written anew, each as one full set.

    Raises:
        UserError: it has none.
    """
    with_files = [each for each in collections.versions(connection, collection.id).values() if each.output]
    if not with_files:
        raise UserError(f"the collection {collection.name} has no files: it was made without an output.")
    for version in with_files:
        collection_files.compact(connection, version.version_id)
