"""Calls of the api, without any sending: what to send, and how to read the answer.

The client and its asynchronous twin differ only in the transport that sends them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote
from uuid import uuid4

from .errors import NotFound
from .records import CollectionStatus, Hit, JobStatus, ModelInfo, Receipt, SyncStatus
from .rows import Data, listed

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T_co]):
    """A request, and the reader of its answer."""

    method: str
    path: str
    read: Callable[[Any], T_co]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    #: Rows that are sent with the body, which becomes a form then.
    data: Data = None
    key: str | None = None
    #: The same again does no harm; a submission has an idempotency key.
    repeatable: bool = True
    #: The answer may take an hour.
    takes_long: bool = False
    #: While another sync of the collection goes on, it is sent again and again.
    queues: bool = False

    def form(self) -> dict[str, Any]:
        """Return the body as the fields of a form."""
        fields = self.body or {}
        return {name: json.dumps(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


def job_path(job: str, more: str = "") -> str:
    """Return the path of a job, named by its id or name."""
    return f"/jobs/{_segment(job)}{more and '/'}{more}"


def collection_path(name: str, more: str = "") -> str:
    """Return the path of a collection."""
    return f"/collections/{_segment(name)}{more and '/'}{more}"


def _segment(name: str) -> str:
    if name in ("", ".", ".."):
        raise NotFound(f'there is no "{name}".')
    return quote(name, safe="")


def submission(
    data: Data,
    *,
    model: str | None,
    text: str | None,
    key: str | None,
    name: str | None,
    carry: Sequence[str] | str,
    labels: Mapping[str, str] | None,
    idempotency_key: str | None,
    options: Mapping[str, Any],
) -> Call[JobStatus]:
    """Return the submission of a job."""
    wish = {
        "model": model,
        **_text(text),
        "key_column": key,
        "name": name,
        "carry": listed(carry),
        "labels": dict(labels or {}),
        **options,
    }
    return _rows_sent("/jobs", wish, data, idempotency_key)


def sync(
    name: str, data: Data, *, queue: bool, idempotency_key: str | None, options: Mapping[str, Any]
) -> Call[JobStatus]:
    """Return a sync of a collection."""
    return _rows_sent(collection_path(name, "syncs"), options, data, idempotency_key, queues=queue)


def _rows_sent(
    path: str, wish: Mapping[str, Any], data: Data, idempotency_key: str | None, *, queues: bool = False
) -> Call[JobStatus]:
    return Call(
        method="POST",
        path=path,
        read=JobStatus.of,
        body=_given(wish),
        data=data,
        key=idempotency_key or f"client {uuid4()}",  # so that what is sent again makes no second job
        takes_long=True,
        queues=queues,
    )


def _given(wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given; False and 0 are."""
    return {option: value for option, value in wish.items() if value is not None and value != [] and value != {}}


def _text(text: str | None) -> dict[str, str | None]:
    """Return the option that a text is: a column, or a template of columns in braces."""
    return {"text": text} if text and "{" in text else {"text_column": text}


def job_status(job: str) -> Call[JobStatus]:
    """Return the question for a job's status."""
    return Call(method="GET", path=job_path(job), read=JobStatus.of)


def jobs(limit: int, filters: Mapping[str, Any]) -> Call[list[JobStatus]]:
    """Return the question for the newest jobs."""
    return Call(method="GET", path="/jobs", params={"limit": limit, **filters}, read=_each(JobStatus.of))


def steering(job: str, verb: str) -> Call[JobStatus]:
    """Return the order to cancel, pause or resume a job."""
    return Call(method="POST", path=job_path(job, verb), read=JobStatus.of)


def retry(job: str) -> Call[int]:
    """Return the order to retry a job; it answers the number of chunks that are open again."""
    path = job_path(job, "retry")
    return Call(method="POST", path=path, read=lambda answer: int(answer["reopened_chunks"]), repeatable=False)


def receipt(job: str, *, verify: bool) -> Call[Receipt]:
    """Return the question for a job's receipt."""
    path = job_path(job, "receipt")
    return Call(method="GET", path=path, params={"verify": verify}, read=Receipt.of, takes_long=verify)


def search(path: str, query: str, k: int, where: Mapping[str, str] | None) -> Call[list[Hit]]:
    """Return a search at the path of a job or a collection."""
    wish: dict[str, Any] = {"query": query, "limit": k}
    if where:
        wish["where"] = dict(where)
    return Call(method="POST", path=f"{path}/search", body=wish, read=_each(Hit.of))


def models() -> Call[list[ModelInfo]]:
    """Return the question for the models."""
    return Call(method="GET", path="/models", read=_each(ModelInfo.of))


def collections() -> Call[list[CollectionStatus]]:
    """Return the question for the collections."""
    return Call(method="GET", path="/collections", read=_each(CollectionStatus.of))


def collection_status(name: str) -> Call[CollectionStatus]:
    """Return the question for a collection's state."""
    return Call(method="GET", path=collection_path(name), read=CollectionStatus.of)


def history(name: str, limit: int) -> Call[list[SyncStatus]]:
    """Return the question for a collection's newest syncs."""
    path = collection_path(name, "syncs")
    return Call(method="GET", path=path, params={"limit": limit}, read=_each(SyncStatus.of))


def creation(
    name: str,
    *,
    model: str | None,
    text: str | None,
    key: str | None,
    carry: Sequence[str] | str,
    options: Mapping[str, Any],
) -> Call[CollectionStatus]:
    """Return the order to create a collection."""
    wish = {"name": name, "model": model, **_text(text), "key_column": key, "carry": listed(carry), **options}
    return Call(
        method="POST",
        path="/collections",
        body=_given(wish),
        read=CollectionStatus.of,
        repeatable=False,
        takes_long=True,
    )


def dropping(name: str) -> Call[None]:
    """Return the order to drop a collection."""
    return Call(method="DELETE", path=collection_path(name), read=lambda _: None, repeatable=False, takes_long=True)


def _each(read: Callable[[Any], T_co]) -> Callable[[Any], list[T_co]]:
    return lambda answer: [read(one) for one in answer["data"]]
