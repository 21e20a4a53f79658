"""Backends of commands on jobs and keys: the database, or at an api that `VECTORMILL_API_URL` names.

Most commands import the one that they need, when they run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union
from uuid import UUID

from pipeline.catalog.keys import NewKey
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.core.errors import UserError
from pipeline.core.job_status import JobStatus, Receipt
from pipeline.core.jobs import JobState
from pipeline.infra.settings import load_settings
from pipeline.jobs.status import Namesake

if TYPE_CHECKING:
    from pipeline.cli.api_backend import ApiBackend
    from pipeline.cli.database_backend import DatabaseBackend


class Backend(Protocol):
    """What commands ask about jobs. A job is named by its id, the beginning of it, or its name.

    All raise `UserError` for what a person can mend, and `ServiceUnreachable`.
    """

    def jobs(self, states: Sequence[JobState], limit: int) -> list[JobStatus]:
        """Statuses of the newest jobs."""

    def status(self, job: str) -> JobStatus:
        """Where a job stands."""

    def namesakes(self, job: str) -> list[Namesake]:
        """All that bear this name, the newest first."""

    def rejects(self, job: str, limit: int | None) -> list[dict[str, Any]]:
        """Its rejects in index order."""

    def reject_counts(self, job: str) -> dict[str, int]:
        """How many rejects it has, by code."""

    def receipt(self, job: str, *, verify: bool) -> Receipt:
        """Its account."""

    def steer(self, job: str, verb: str) -> tuple[UUID, JobState]:
        """`cancel`, `pause` or `resume` it. Returns its id and state."""

    def prioritise(self, job: str, priority: int) -> UUID:
        """Change its place among others. Returns its id."""

    def retry(self, job: str) -> tuple[UUID, int]:
        """Try again what may succeed. Returns its id, and how many chunks are to be done."""

    def results(self, job: str, to: Path) -> str:
        """Write its vectors to a .parquet or .jsonl file. Returns what was written, for a person."""

    def models(self, *, everything: bool) -> list[Mapping[str, Any]]:
        """The catalogue's models, or only those that the workspace may use."""

    def create_key(self, name: str, *, admin: bool, lives: timedelta | None) -> NewKey:
        """Make a key of the workspace."""

    def keys(self) -> list[dict[str, Any]]:
        """The workspace's keys, newest first, without their secrets; moments as ISO 8601."""

    def rotate_key(self, key: str, overlap: timedelta) -> NewKey:
        """Make a key in place of another one."""

    def revoke_key(self, key: str) -> None:
        """End a key now."""


@contextmanager
def open_backend(workspace: str = DEFAULT_WORKSPACE) -> Iterator[Union["DatabaseBackend", "ApiBackend"]]:
    """Where the environment says that commands are carried out, for the length of one."""
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
