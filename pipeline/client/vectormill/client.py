"""The client: jobs and collections of one workspace, over the api."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from . import calls
from .collection import Collection
from .job import Job
from .records import CollectionStatus, JobStatus, ModelInfo
from .rows import Data
from .transport import Transport


class Client:
    """Client of an api, with the rights of a key. It may be shared by threads; close it, or use it in a `with`."""

    def __init__(self, url: str, key: str, *, workspace: str | None = None) -> None:
        """Create a client; nothing is sent yet.

        Args:
            url: of the api, such as `http://127.0.0.1:8000`.
            key: that `vectormill keys create` has made.
            workspace: with an admin's key: another one than the key's.
        """
        self._transport = Transport(url, key, workspace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<vectormill.Client {self._transport.url}>"

    def close(self) -> None:
        """Close the connections to the api."""
        self._transport.close()

    def embed(
        self,
        data: Data = None,
        *,
        model: str | None = None,
        text: str | None = None,
        key: str | None = None,
        name: str | None = None,
        carry: Sequence[str] | str = (),
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Job:
        """Submit a job that embeds these rows. It is in the database when this returns.

        Args:
            data: a data frame (Polars, pandas, Arrow, DuckDB and others), a path, a URI that the api may read, a list
                of `Path`, a cursor on which a query was executed, or an iterable of mappings or of texts. Without it,
                `sources=[…]` names files on the api's machine.
            model: the model, by name or alias. Default: the only one there is.
            text: the column of the texts, or a template such as `"{subject}\\n\\n{body}"`. Default: `text`.
            key: the column of the keys. Default: `id`.
            name: the job's name.
            carry: columns that come along with the vectors.
            labels: kept with job and usage.
            idempotency_key: submitting again with this key gives the same job.
            options: more fields of `POST /api/jobs`, such as `split=256`, `dimensions=128` or `reuse=False`.

        Raises:
            UserError: the rows or an argument don't fit; the message names it.
            ServiceUnreachable: the api can't be reached.
        """
        call = calls.submission(
            data,
            model=model,
            text=text,
            key=key,
            name=name,
            carry=carry,
            labels=labels,
            idempotency_key=idempotency_key,
            options=options,
        )
        made = self._transport.send(call)
        return Job(self._transport, str(made.id), made=made)

    def job(self, job: str) -> Job:
        """Return a job by its id, the beginning of that, or its name. Nothing is sent yet."""
        return Job(self._transport, str(job))

    def jobs(self, limit: int = 20, **filters: Any) -> list[JobStatus]:
        """Return the newest jobs, newest first, such as those with `state="failed"` or `label="team=search"`."""
        return self._transport.send(calls.jobs(limit, filters))

    def models(self) -> list[ModelInfo]:
        """Return the models that the key may use."""
        return self._transport.send(calls.models())

    def collection(self, name: str) -> Collection:
        """Return a collection by its name. Nothing is sent yet."""
        return Collection(self._transport, name)

    def collections(self) -> list[CollectionStatus]:
        """Return the workspace's collections, by name."""
        return self._transport.send(calls.collections())

    def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        text: str | None = None,
        key: str | None = None,
        carry: Sequence[str] | str = (),
        **options: Any,
    ) -> Collection:
        """Create an empty collection, and the view that shows it; syncs fill it. The arguments are those of `embed`;
        `options` are more fields of `POST /api/collections`, such as `expect_every_seconds=86400`."""
        self._transport.send(calls.creation(name, model=model, text=text, key=key, carry=carry, options=options))
        return Collection(self._transport, name)
