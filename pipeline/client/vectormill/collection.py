"""Collections: a named set of items by key, which syncs bring up to a source."""

from collections.abc import Mapping
from typing import Any

from . import calls
from .job import Job
from .records import CollectionStatus, Hit, SyncStatus
from .rows import Data
from .transport import Transport


class Collection:
    """A collection of the workspace, by its name."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._transport = transport
        self.name = name

    def __repr__(self) -> str:
        return f"<vectormill.Collection {self.name}>"

    def status(self) -> CollectionStatus:
        """Return the collection's model, size and last sync."""
        return self._transport.send(calls.collection_status(self.name))

    def sync(
        self,
        data: Data = None,
        *,
        delta: bool = False,
        removed_column: str | None = None,
        queue: bool = True,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Job:
        """Bring the collection up to these rows: embed what is new or changed, remove what they lack.

        Args:
            data: rows, as `Client.embed` takes them, with the columns that the collection was created with.
            delta: they are only what changed; other keys stay.
            removed_column: of a delta: the column that is true in rows whose key goes.
            queue: wait while another sync of the collection goes on, instead of raising.
            idempotency_key: syncing again with this key gives the same job.
            options: more fields of `POST /api/collections/NAME/syncs`, such as `max_removed="50%"` or `atomic=True`.

        Raises:
            CollectionBusy: without `queue`, another sync goes on.
        """
        call = calls.sync(
            self.name,
            data,
            queue=queue,
            idempotency_key=idempotency_key,
            options={"delta": delta, "removed_column": removed_column, **options},
        )
        made = self._transport.send(call)
        return Job(self._transport, str(made.id), made=made)

    def search(self, query: str, k: int = 10, *, where: Mapping[str, str] | None = None) -> list[Hit]:
        """Return the `k` keys or passages nearest to a query in words, of those with these carried values."""
        return self._transport.send(calls.search(calls.collection_path(self.name), query, k, where))

    def history(self, limit: int = 20) -> list[SyncStatus]:
        """Return the newest syncs, newest first, with what each changed."""
        return self._transport.send(calls.history(self.name, limit))

    def drop(self) -> None:
        """Drop the collection with its view, vectors and history. Its jobs stay."""
        self._transport.send(calls.dropping(self.name))
