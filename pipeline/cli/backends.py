"""Backends of commands on jobs, models and keys: the database, or the api that `VECTORMILL_API_URL` names.

Most commands import only the backend that they use, when they run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union
from uuid import UUID

from pipeline.catalog.keys import NewKey
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.core.collection_status import CollectionStatus, Comparison, SyncStatus
from pipeline.core.errors import UserError
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.job_status import JobStatus, Receipt
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions
from pipeline.infra.settings import load_settings
from pipeline.jobs.status import Namesake

if TYPE_CHECKING:
    from pipeline.cli.api_backend import ApiBackend
    from pipeline.cli.database_backend import DatabaseBackend


class Backend(Protocol):
    """Operations of commands on jobs, models and keys. A job is given by its id, the beginning of its id, or its name.

    All raise `UserError` for an error that the user can fix, and `ServiceUnreachable`.
    """

    def jobs(self, states: Sequence[JobState], limit: int) -> list[JobStatus]:
        """Return the statuses of the newest jobs, newest first."""

    def status(self, job: str) -> JobStatus:
        """Return a job's status."""

    def namesakes(self, job: str) -> list[Namesake]:
        """Return the jobs of this name, newest first, at most 100."""

    def rejects(self, job: str, limit: int | None) -> list[dict[str, Any]]:
        """Return a job's rejects in index order, at most `limit`."""

    def reject_counts(self, job: str) -> dict[str, int]:
        """Return the number of a job's rejects by code."""

    def receipt(self, job: str, *, verify: bool) -> Receipt:
        """Return a job's receipt, checked against its rows if `verify` is set."""

    def steer(self, job: str, verb: str) -> tuple[UUID, JobState]:
        """Apply `cancel`, `pause` or `resume` to a job. Return its id and state."""

    def prioritise(self, job: str, priority: int) -> UUID:
        """Change a job's priority. Return its id."""

    def retry(self, job: str) -> tuple[UUID, int]:
        """Reopen an ended job's chunks that can be retried. Return its id, and the number of chunks."""

    def results(self, job: str, to: Path) -> str:
        """Write a job's vectors to a .parquet or .jsonl file. Return a sentence for the user on what was written."""

    def models(self, *, everything: bool) -> list[Mapping[str, Any]]:
        """Return the catalogue's models, or only those that the workspace may use."""

    def collections(self) -> list[CollectionStatus]:
        """Return the states of the workspace's collections, by name."""

    def collection(self, name: str) -> CollectionStatus:
        """Return a collection's state."""

    def history(self, name: str, limit: int) -> list[SyncStatus]:
        """Return a collection's newest syncs, newest first."""

    def create_collection(
        self, name: str, model: str | None, options: JobOptions, expect_every: timedelta | None
    ) -> CollectionStatus:
        """Create an empty collection."""

    def drop_collection(self, name: str) -> None:
        """Drop a collection with its view, vectors and history."""

    def upgrade_collection(
        self, name: str, model: str, dimensions: int | None, into: str | None, output: str | None
    ) -> CollectionStatus:
        """Begin a collection's next version, of another model."""

    def compact(self, name: str) -> None:
        """Let a collection's Parquet files be written anew as one full set."""

    def abandon_upgrade(self, name: str) -> None:
        """Let a collection's next version go."""

    def compare_versions(self, name: str) -> Comparison:
        """Compare a collection's next version with the current one."""

    def swap(self, name: str, keep: timedelta | None) -> CollectionStatus:
        """Give readers a collection's next version, and keep the one before for `keep`, or for the default time."""

    def swap_back(self, name: str) -> CollectionStatus:
        """Undo a swap."""

    def forget(self, keys: Iterable[str], collection: str | None) -> ForgetStatus:
        """Request that keys are forgotten."""

    def forget_status(self, forget_id: UUID) -> ForgetStatus:
        """Return how far a request to forget keys is."""

    def allow(self, keys: Iterable[str], collection: str | None) -> int:
        """Let forgotten keys come in again. Return how many of them were forgotten."""

    def create_key(self, name: str, *, admin: bool, lives: timedelta | None) -> NewKey:
        """Create a key in the workspace, which expires after `lives` or never."""

    def keys(self) -> list[dict[str, Any]]:
        """Return the workspace's keys, newest first, without their secrets; times as ISO 8601."""

    def rotate_key(self, key: str, overlap: timedelta) -> NewKey:
        """Create a key that replaces another one, which stays valid for `overlap`."""

    def revoke_key(self, key: str) -> None:
        """Revoke a key now."""


@contextmanager
def open_backend(workspace: str = DEFAULT_WORKSPACE) -> Iterator[Union["DatabaseBackend", "ApiBackend"]]:
    """Yield the backend for one command: the api if the environment names one and no database, else the database."""
    settings = load_settings()
    if settings.api_url is None or settings.database_url:
        from pipeline.cli.context import working
        from pipeline.cli.database_backend import DatabaseBackend

        with working(workspace) as place:
            yield DatabaseBackend(place)
        return
    from pipeline.cli.api_backend import ApiBackend

    if settings.api_key is None:
        raise UserError("VECTORMILL_API_URL needs VECTORMILL_API_KEY, a key that vectormill keys create has made.")
    backend = ApiBackend(settings.api_url, settings.api_key.get_secret_value(), workspace)
    try:
        yield backend
    finally:
        backend.close()
