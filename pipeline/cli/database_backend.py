"""Backend of commands that works on the database.

Modules that load Arrow are imported where they are used, since most commands don't need it.
"""

import getpass
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from pipeline.catalog import keys
from pipeline.catalog.keys import NewKey
from pipeline.cli.context import CommandContext
from pipeline.core.collection_status import CollectionStatus, Comparison, SyncStatus
from pipeline.core.errors import ServiceUnreachable
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.job_status import JobStatus, Receipt
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.db import keys as stored_keys
from pipeline.db import models, rejects
from pipeline.db.collections import Collection
from pipeline.db.database import is_connection_lost
from pipeline.jobs import collections, control, forgetting, status
from pipeline.jobs.status import Namesake

_PAGE = 1_000
_MOST_NAMESAKES = 100
_MOMENTS = ("created_at", "expires_at", "revoked_at")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"user {os.getuid()}"


class DatabaseBackend:
    """Backend that works in one workspace of a database."""

    def __init__(self, place: CommandContext) -> None:
        self.place = place

    @contextmanager
    def _of(self, job: str) -> Iterator[tuple[Connection, UUID]]:
        with self.place.engine.begin() as connection:
            yield connection, status.find_job(connection, self.place.workspace_id, job)

    @contextmanager
    def _changing(self, job: str, *, ended: bool) -> Iterator[tuple[Connection, UUID]]:
        with self.place.engine.begin() as connection:
            yield connection, status.find_job_to_change(connection, self.place.workspace_id, job, ended=ended)

    def namesakes(self, job: str) -> list[Namesake]:
        """Return the jobs of this name, newest first, at most 100."""
        with self.place.engine.begin() as connection:
            return status.namesakes(connection, self.place.workspace_id, job, _MOST_NAMESAKES)

    def jobs(self, states: Sequence[JobState], limit: int) -> list[JobStatus]:
        """Return the statuses of the newest jobs, newest first."""
        with self.place.engine.begin() as connection:
            return status.list_jobs(connection, self.place.workspace_id, states=states, limit=limit)

    def status(self, job: str) -> JobStatus:
        """Return a job's status."""
        try:
            with self._of(job) as (connection, found):
                return status.job_status(connection, found)
        except DBAPIError as error:
            if is_connection_lost(error):
                raise ServiceUnreachable("can't reach the database.") from error
            raise

    def rejects(self, job: str, limit: int | None) -> list[dict[str, Any]]:
        """Return a job's rejects in index order, at most `limit`."""
        rows: list[dict[str, Any]] = []
        with self._of(job) as (connection, found):
            while limit is None or len(rows) < limit:
                size = _PAGE if limit is None else min(_PAGE, limit - len(rows))
                page = rejects.page(connection, found, rows[-1]["index"] if rows else -1, size)
                rows += page
                if len(page) < size:
                    break
        return rows

    def reject_counts(self, job: str) -> dict[str, int]:
        """Return the number of a job's rejects by code."""
        with self._of(job) as (connection, found):
            return rejects.count_by_code(connection, found)

    def receipt(self, job: str, *, verify: bool) -> Receipt:
        """Return a job's receipt, checked against its rows if `verify` is set."""
        with self._of(job) as (connection, found):
            if not verify:
                return status.receipt(connection, found)
            from pipeline.jobs.verification import verified_receipt

            return verified_receipt(connection, found)

    def steer(self, job: str, verb: str) -> tuple[UUID, JobState]:
        """Apply `cancel`, `pause` or `resume` to a job. Return its id and state."""
        act = {"cancel": control.cancel, "pause": control.pause, "resume": control.resume}[verb]
        with self._changing(job, ended=False) as (connection, found):
            return found, act(connection, found)

    def prioritise(self, job: str, priority: int) -> UUID:
        """Change a job's priority. Return its id."""
        with self._changing(job, ended=False) as (connection, found):
            control.prioritise(connection, found, priority)
            return found

    def retry(self, job: str) -> tuple[UUID, int]:
        """Reopen an ended job's chunks that can be retried. Return its id, and the number of chunks."""
        with self._changing(job, ended=True) as (connection, found):
            return found, control.retry(connection, found)

    def results(self, job: str, to: Path) -> str:
        """Write a job's vectors to a file. Return a sentence for the user on what was written."""
        from pipeline.jobs.results import export

        with self._of(job) as (_, found):
            pass
        return f"{export(self.place.engine, found, to):,} vectors written to {to}."

    def models(self, *, everything: bool) -> list[Mapping[str, Any]]:
        """Return the catalogue's models, or only those that the workspace may use."""
        with self.place.engine.begin() as connection:
            rows = models.listed(connection, None if everything else self.place.workspace_id)
            return [dict(row) for row in rows]

    def collections(self) -> list[CollectionStatus]:
        """Return the states of the workspace's collections, by name."""
        with self.place.engine.begin() as connection:
            return collections.list_collections(connection, self.place.workspace_id)

    @contextmanager
    def _of_collection(self, name: str) -> Iterator[tuple[Connection, Collection]]:
        with self.place.engine.begin() as connection:
            yield connection, collections.find_collection(connection, self.place.workspace_id, name)

    def collection(self, name: str) -> CollectionStatus:
        """Return a collection's state."""
        with self._of_collection(name) as (connection, found):
            return collections.collection_status(connection, found)

    def history(self, name: str, limit: int) -> list[SyncStatus]:
        """Return a collection's newest syncs, newest first."""
        with self._of_collection(name) as (connection, found):
            return collections.history(connection, found, limit)

    def create_collection(
        self, name: str, model: str | None, options: JobOptions, expect_every: timedelta | None
    ) -> CollectionStatus:
        """Create an empty collection."""
        from pipeline.ingest.collections import create_collection

        place = self.place
        with place.engine.begin() as connection:
            made = create_collection(
                connection, place.workspace_id, name, model=model, options=options, expect_every=expect_every
            )
            return collections.collection_status(connection, made)

    def drop_collection(self, name: str) -> None:
        """Drop a collection with its view, vectors and history."""
        with self._of_collection(name) as (connection, found):
            collections.drop_collection(connection, found)

    def upgrade_collection(
        self, name: str, model: str, dimensions: int | None, into: str | None, output: str | None
    ) -> CollectionStatus:
        """Begin a collection's next version, of another model."""
        from pipeline.ingest.collections import upgrade_collection

        with self._of_collection(name) as (connection, found):
            upgrade_collection(
                connection, found.workspace_id, name, model=model, dimensions=dimensions, into=into, output=output
            )
            return collections.collection_status(connection, found)

    def compact(self, name: str) -> None:
        """Let a collection's Parquet files be written anew as one full set."""
        with self._of_collection(name) as (connection, found):
            collections.compact(connection, found)

    def abandon_upgrade(self, name: str) -> None:
        """Let a collection's next version go."""
        with self._of_collection(name) as (connection, found):
            collections.abandon_upgrade(connection, found)

    def compare_versions(self, name: str) -> Comparison:
        """Compare a collection's next version with the current one."""
        from pipeline.jobs.comparison import compare

        with self._of_collection(name) as (connection, found):
            return compare(connection, found)

    def swap(self, name: str, keep: timedelta | None) -> CollectionStatus:
        """Give readers a collection's next version, and keep the one before for `keep`, or for the default time."""
        with self._of_collection(name) as (connection, found):
            collections.swap(connection, found, keep=keep or collections.KEEP)
        return self.collection(name)

    def swap_back(self, name: str) -> CollectionStatus:
        """Undo a swap."""
        with self._of_collection(name) as (connection, found):
            collections.swap_back(connection, found)
        return self.collection(name)

    def forget(self, keys: Iterable[str], collection: str | None) -> ForgetStatus:
        """Request that keys are forgotten."""
        made = forgetting.forget_keys(
            self.place.engine,
            self.place.workspace_id,
            keys,
            by=_who(),
            collection=self._collection_or_all(collection),
        )
        return self.forget_status(made)

    def forget_status(self, forget_id: UUID) -> ForgetStatus:
        """Return how far a request to forget keys is."""
        with self.place.engine.begin() as connection:
            return forgetting.forget_status(connection, self.place.workspace_id, forget_id)

    def allow(self, keys: Iterable[str], collection: str | None) -> int:
        """Let forgotten keys come in again. Return how many of them were forgotten."""
        place = self.place
        return forgetting.allow_keys(
            place.engine, place.workspace_id, keys, collection=self._collection_or_all(collection)
        )

    def _collection_or_all(self, name: str | None) -> Collection | None:
        if name is None:
            return None
        with self._of_collection(name) as (_, found):
            return found

    def create_key(self, name: str, *, admin: bool, lives: timedelta | None) -> NewKey:
        """Create a key in the workspace, which expires after `lives` or never."""
        with self.place.engine.begin() as connection:
            return keys.create(connection, self.place.workspace_id, name, admin=admin, lives=lives)

    def keys(self) -> list[dict[str, Any]]:
        """Return the workspace's keys, without their secrets; times as ISO 8601."""
        with self.place.engine.begin() as connection:
            rows = [dict(row) for row in stored_keys.every(connection, self.place.workspace_id)]
        for row in rows:
            row |= {name: row[name].isoformat() if row[name] else None for name in _MOMENTS}
        return rows

    def rotate_key(self, key: str, overlap: timedelta) -> NewKey:
        """Create a key that replaces another one, which stays valid for `overlap`."""
        with self.place.engine.begin() as connection:
            return keys.rotate(connection, self.place.workspace_id, key, overlap)

    def revoke_key(self, key: str) -> None:
        """Revoke a key now."""
        with self.place.engine.begin() as connection:
            keys.revoke(connection, self.place.workspace_id, key)
