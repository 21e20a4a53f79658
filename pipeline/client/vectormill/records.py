"""Typed values of the api's answers. Fields that a newer api adds are passed over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

Record = TypeVar("Record")

_ENDED = ("completed", "failed", "cancelled")


def _of(kind: type[Record], answer: Mapping[str, Any], **more: Any) -> Record:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{**{name: value for name, value in answer.items() if name in known}, **more})


def _moment(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemCounts:
    """Counts of a job's items."""

    total: int = 0
    embedded: int = 0
    reused: int = 0
    #: Rows of a sync whose text the collection has already.
    unchanged: int = 0
    rejected: int = 0
    cancelled: int = 0
    pending: int = 0
    truncated: int = 0
    #: Keys that a sync has removed.
    removed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """State and progress of a job."""

    id: UUID
    name: str
    #: staging, queued, running, paused, cancelling, completed, failed or cancelled.
    state: str
    #: Why it is paused or has failed; and in a sentence.
    reason: str | None = None
    message: str | None = None
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    #: What may be a mistake in the rows and is none for sure.
    notices: Sequence[str] = ()
    items: ItemCounts = ItemCounts()
    #: Tokens embedded so far, and tokens and items a second over the last minute.
    tokens: int = 0
    tokens_per_second: float = 0.0
    items_per_second: float = 0.0
    eta_seconds: float | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def ended(self) -> bool:
        """True if it is completed, failed or cancelled."""
        return self.state in _ENDED

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "JobStatus":
        """Return the status that the api has answered."""
        rate = answer.get("rate", {})
        return _of(
            cls,
            answer,
            id=UUID(answer["id"]),
            items=_of(ItemCounts, answer.get("items", {})),
            tokens=answer.get("tokens", {}).get("prompt", 0),
            tokens_per_second=rate.get("tokens_per_second", 0.0),
            items_per_second=rate.get("items_per_second", 0.0),
            **{name: _moment(answer.get(name)) for name in ("created_at", "started_at", "finished_at")},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Account of a job: items in = embedded + reused + unchanged + rejected + cancelled."""

    id: UUID
    state: str
    #: `in`, `embedded`, `reused` and so on; and tokens `prompt`, `billed`, `saved` and so on.
    items: Mapping[str, int]
    tokens: Mapping[str, int]
    balanced: bool
    #: Result of counting the rows one by one: no item is missing, and none is there twice. `None`: not asked for.
    verified: bool | None = None
    missing: int | None = None
    double: int | None = None
    counting: Callable[[], "Receipt"] | None = field(default=None, repr=False, compare=False)

    def verify(self) -> "Receipt":
        """Count the job's rows one by one. Return the receipt with `verified`, `missing` and `double`."""
        if self.counting is None and self.verified is None:
            raise TypeError("this receipt can't count by itself: ask for it by receipt(verify=True)")
        return self.counting() if self.counting else self

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Receipt":
        """Return the receipt that the api has answered."""
        return _of(cls, answer, id=UUID(answer["id"]))


@dataclass(frozen=True, slots=True)
class Reject:
    """Item that can't be embedded."""

    index: int
    key: str | None
    code: str
    message: str

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Reject":
        """Return the reject that the api has answered."""
        return _of(cls, answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """Item or passage that a search found."""

    key: str | None
    #: Cosine similarity, at most 1.
    similarity: float
    #: Of a job: the item's index, and its text while that is kept.
    index: int | None = None
    text: str | None = None
    carried: Mapping[str, Any] | None = None
    #: Number of the passage, and its characters in the text: `text[start:stop]`.
    passage: int | None = None
    start: int | None = None
    stop: int | None = None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Hit":
        """Return the hit that the api has answered."""
        return _of(cls, answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionStatus:
    """State of a collection."""

    name: str
    #: View that shows it, in the schema `vectormill`.
    view: str
    model: str
    dimensions: int
    #: Keys that have vectors; above 100,000 an estimate.
    keys: int
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Its sync that hasn't ended.
    running: UUID | None = None
    synced_at: datetime | None = None
    created_at: datetime | None = None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "CollectionStatus":
        """Return the state that the api has answered."""
        running = answer.get("running")
        return _of(
            cls,
            answer,
            running=UUID(running) if running else None,
            **{name: _moment(answer.get(name)) for name in ("synced_at", "created_at")},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncStatus:
    """A sync of a collection's history."""

    job_id: UUID
    #: `None`: its job is purged.
    state: str | None
    delta: bool = False
    #: Keys that are new, and that have new vectors.
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    rejected: int = 0
    #: Tokens of reused and unchanged texts, which nothing embedded.
    tokens_saved: int = 0
    seconds: float = 0.0
    created_at: datetime | None = None
    finished_at: datetime | None = None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "SyncStatus":
        """Return the sync that the api has answered."""
        moments = {name: _moment(answer.get(name)) for name in ("created_at", "finished_at")}
        return _of(cls, answer, job_id=UUID(answer["job_id"]), **moments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Model that the key may use."""

    name: str
    dimensions: int
    #: Most tokens that it reads of a text; `None`: of any.
    max_item_tokens: int | None = None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "ModelInfo":
        """Return the model that the api has answered."""
        return _of(cls, answer)
