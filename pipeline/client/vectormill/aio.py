"""Asynchronous twins of the client, of its jobs and collections. Arguments and errors are the same."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

from . import calls
from .errors import ServiceUnreachable
from .job import Watch
from .records import CollectionStatus, Hit, JobStatus, Receipt, Reject
from .rows import Data
from .transport import AsyncTransport


class AsyncJob:
    """A job. Iterated over by `async for`, it gives its rows."""

    def __init__(self, transport: AsyncTransport, job: str) -> None:
        self._transport, self._job = transport, job
        self._is_id = False

    async def _id(self) -> str:
        """Return the job's id, so that a later job of its name isn't taken for it."""
        return self._job if self._is_id else str((await self.status()).id)

    async def status(self) -> JobStatus:
        """Return the job's state and progress."""
        found = await self._transport.send(calls.job_status(self._job))
        self._job, self._is_id = str(found.id), True
        return found

    async def wait(self, timeout: float | None = None) -> JobStatus:
        """Wait until the job is completed. Raises as `Job.wait`."""
        watch = Watch(timeout)
        while True:
            try:
                done = watch.look(self._job, await self.status())
            except ServiceUnreachable as error:
                done = watch.look(self._job, error)
            if done:
                return done
            await asyncio.sleep(watch.pause_seconds)

    async def cancel(self) -> JobStatus:
        """Cancel the job. What is committed stays."""
        return await self._transport.send(calls.steering(await self._id(), "cancel"))

    async def receipt(self, *, verify: bool = False) -> Receipt:
        """Return the job's account; with `verify`, its rows are counted one by one."""
        return await self._transport.send(calls.receipt(await self._id(), verify=verify))

    async def rejects(self) -> AsyncIterator[Reject]:
        """Yield the items that can't be embedded."""
        async for line in self._lines("rejects"):
            yield Reject.of(line)

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._lines("results")

    async def _lines(self, what: str) -> AsyncIterator[Any]:
        path = calls.job_path(await self._id(), what)
        async with self._transport.stream(path, format="jsonl") as reply:
            async for line in reply.aiter_lines():
                yield json.loads(line)

    async def search(self, query: str, k: int = 10, *, where: Mapping[str, str] | None = None) -> list[Hit]:
        """Return the `k` items nearest to a query in words."""
        return await self._transport.send(calls.search(calls.job_path(await self._id()), query, k, where))


class AsyncCollection:
    """A collection of the workspace, by its name."""

    def __init__(self, transport: AsyncTransport, name: str) -> None:
        self._transport = transport
        self.name = name

    async def status(self) -> CollectionStatus:
        """Return the collection's model, size and last sync."""
        return await self._transport.send(calls.collection_status(self.name))

    async def sync(
        self, data: Data = None, *, queue: bool = True, idempotency_key: str | None = None, **options: Any
    ) -> AsyncJob:
        """Bring the collection up to these rows. `options` and errors are those of `Collection.sync`."""
        call = calls.sync(self.name, data, queue=queue, idempotency_key=idempotency_key, options=options)
        return AsyncJob(self._transport, str((await self._transport.send(call)).id))

    async def search(self, query: str, k: int = 10, *, where: Mapping[str, str] | None = None) -> list[Hit]:
        """Return the `k` keys or passages nearest to a query in words, of those with these carried values."""
        return await self._transport.send(calls.search(calls.collection_path(self.name), query, k, where))


class AsyncClient:
    """Client of an api whose calls are awaited."""

    def __init__(self, url: str, key: str, *, workspace: str | None = None) -> None:
        """Create a client; nothing is sent yet. The arguments are those of `Client`."""
        self._transport = AsyncTransport(url, key, workspace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to the api."""
        await self._transport.close()

    async def embed(
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
    ) -> AsyncJob:
        """Submit a job that embeds these rows. Arguments and errors are those of `Client.embed`."""
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
        return AsyncJob(self._transport, str((await self._transport.send(call)).id))

    def job(self, job: str) -> AsyncJob:
        """Return a job by its id, the beginning of that, or its name."""
        return AsyncJob(self._transport, job)

    def collection(self, name: str) -> AsyncCollection:
        """Return a collection by its name."""
        return AsyncCollection(self._transport, name)
