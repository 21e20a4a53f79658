"""Python client of vectormill: embed rows, wait, and take the vectors back; sync collections, and search them.

    import vectormill

    mill = vectormill.connect()                       # the `vectormill up` that runs here, or a url and a key
    job = mill.embed(frame, model="all-MiniLM-L6-v2", text="{subject}\\n\\n{body}", key="id")
    job.wait()
    vectors = job.to_polars()

It speaks HTTP to an api, and imports nothing of the pipeline.
"""

import os
from typing import Any

from .aio import AsyncClient, AsyncCollection, AsyncJob
from .client import Client
from .collection import Collection
from .errors import (
    CollectionBusy,
    JobNotCompleted,
    KeyRefused,
    NotFound,
    ServiceUnreachable,
    UserError,
    VectormillError,
    WaitTimedOut,
)
from .job import Job
from .records import CollectionStatus, Hit, ItemCounts, JobStatus, ModelInfo, Receipt, Reject, SyncStatus
from .transport import local_api

__all__ = [
    "AsyncClient",
    "AsyncCollection",
    "AsyncJob",
    "Client",
    "Collection",
    "CollectionBusy",
    "CollectionStatus",
    "Hit",
    "ItemCounts",
    "Job",
    "JobNotCompleted",
    "JobStatus",
    "KeyRefused",
    "ModelInfo",
    "NotFound",
    "Receipt",
    "Reject",
    "ServiceUnreachable",
    "SyncStatus",
    "UserError",
    "VectormillError",
    "WaitTimedOut",
    "connect",
    "connect_async",
]


def connect(url: str | None = None, key: str | None = None, *, workspace: str | None = None) -> Client:
    """Return a client of an api.

    Args:
        url: of the api. Default: VECTORMILL_API_URL, else the `vectormill up` that runs here.
        key: that `vectormill keys create` has made. Default: VECTORMILL_API_KEY, or the key of that `up`.
        workspace: with an admin's key: another one than the key's.

    Raises:
        ServiceUnreachable: no url is given, and nothing runs here.
        UserError: a url is given, and no key.
    """
    return Client(*_address(url, key), workspace=workspace)


def connect_async(url: str | None = None, key: str | None = None, *, workspace: str | None = None) -> AsyncClient:
    """Return a client whose calls are awaited. Arguments and errors are those of `connect`."""
    return AsyncClient(*_address(url, key), workspace=workspace)


def _address(url: str | None, key: str | None) -> tuple[str, str]:
    url, key = url or os.environ.get("VECTORMILL_API_URL"), key or os.environ.get("VECTORMILL_API_KEY")
    if url is None:
        url, own = local_api()
        return url, key or own
    if not key:
        raise UserError("an api needs a key; give one that `vectormill keys create` has made.", field="key")
    return url, key


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up only when asked for: it reads the installed packages
        from importlib.metadata import version

        return version("vectormill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
