"""Cache of keys, models and engines from Postgres, at most two seconds old; older while Postgres is away or slow."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, RowMapping
from sqlalchemy.exc import SQLAlchemyError

from pipeline.api.database import Database, unreachable
from pipeline.catalog import keys as api_keys
from pipeline.core.errors import ApiError, Forbidden, InvalidApiKey, ModelNotFound, Unauthorized
from pipeline.db import engines, models, usage
from pipeline.db import keys as stored_keys
from pipeline.infra import metrics

_FRESH_SECONDS = 2.0
#: Timeout of a query when a stale answer is cached, and when none is.
_PATIENCE_SECONDS = 0.5
_MOST_SECONDS = 5.0
#: Time after a failure of the database in which stale answers are returned without a query.
_REST_SECONDS = 1.5
#: Usage of a month changes slowly, and its sum is expensive.
_MONTH_FRESH_SECONDS = 10.0
_MONTH_PATIENCE_SECONDS = 0.0
#: Greatest age of an answer that is returned while the database is away.
_STALE_SECONDS = 300.0
_MOST_KEPT = 10_000
#: Keys looked up in one query, and concurrent queries of this kind: a query that hangs holds up only half.
_KEYS_AT_ONCE = 1_000
_KEY_QUESTIONS = 2
_ENGINE_SILENCE_SECONDS = 10.0
#: Time that engines need to announce themselves again after the database was away.
_ENGINE_GRACE_SECONDS = 10.0

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Caller known by a live key, with the limits of their workspace."""

    key_id: str
    workspace_id: int
    admin: bool
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_tokens: int | None
    monthly_cost: Decimal | None

    def must_be_admin(self) -> None:
        """Check that the key is an admin's.

        Raises:
            Forbidden: it isn't.
        """
        if not self.admin:
            raise Forbidden("This needs an admin's key.")


class _Kept(Generic[Found]):
    """Cache of a query's answers, each refreshed when it is too old.

    Concurrent callers share one query. They wait for it, but not for long if a stale answer is cached.
    """

    def __init__(
        self,
        database: Database,
        ask: Callable[..., Awaitable[Found]],
        fresh_seconds: float = _FRESH_SECONDS,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._database, self._ask = database, ask
        self._fresh_seconds, self._patience_seconds = fresh_seconds, patience_seconds
        self._known: OrderedDict[Hashable, tuple[float, Found]] = OrderedDict()
        #: Queries whose answer is None. Kept apart, so that made-up ones can't evict real answers.
        self._unknown: OrderedDict[Hashable, tuple[float, Found]] = OrderedDict()
        self._under_way: dict[Hashable, asyncio.Task[Found]] = {}

    async def get(self, *question: Any) -> Found:
        """Return the answer to a query, from the cache or from the database.

        Raises:
            Busy: the timeout passed while other queries were answered.
            UpstreamUnavailable: the database is away, and no answer recent enough is cached.
        """
        kept = self._known.get(question) or self._unknown.get(question)
        age = time.monotonic() - kept[0] if kept else float("inf")
        if kept and age < self._fresh_seconds:
            return kept[1]
        old = kept if age < _STALE_SECONDS else None
        if old and self._database.seconds_since_failure < _REST_SECONDS:
            return old[1]
        task, seconds = self._task(question), self._patience_seconds if old else _MOST_SECONDS
        await asyncio.wait((task,), timeout=seconds)
        late: ApiError | None = None
        if not task.done():
            late = self._database.note_late(seconds) if self._patience_seconds else None
        elif not isinstance(task.exception(), SQLAlchemyError):
            return task.result()
        if old:
            return old[1]
        raise late or unreachable()

    def _task(self, question: tuple[Any, ...]) -> "asyncio.Task[Found]":
        task = self._under_way.get(question)
        if task is None:
            task = asyncio.ensure_future(self._ask(*question))
            self._under_way[question] = task
            task.add_done_callback(lambda done: self._keep(question, done))
        return task

    def _keep(self, question: Hashable, done: "asyncio.Task[Found]") -> None:
        del self._under_way[question]
        if done.cancelled():
            return
        if error := done.exception():
            if isinstance(error, SQLAlchemyError):
                self._database.note_failure(error)
            return
        self._known.pop(question, None)
        self._unknown.pop(question, None)
        kept = self._unknown if done.result() is None else self._known
        kept[question] = (time.monotonic(), done.result())
        while len(kept) > _MOST_KEPT:
            kept.popitem(last=False)


Key = tuple[RowMapping, float]


class _Keys:
    """Batched look-ups of keys: invented keys, on any number of connections, can't fill the queue of queries."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asked: dict[str, asyncio.Future[Key | None]] = {}
        self._askers: set[asyncio.Task[None]] = set()

    async def find(self, key_id: str) -> Key | None:
        """Return a live key and its expiry on this process's clock; None if there is none."""
        answer = self._asked.get(key_id)
        if answer is None:
            answer = self._asked[key_id] = asyncio.get_running_loop().create_future()
        if len(self._askers) < _KEY_QUESTIONS:
            asker = asyncio.ensure_future(self._ask())
            self._askers.add(asker)
            asker.add_done_callback(self._askers.discard)
        return await answer

    async def _ask(self) -> None:
        while self._asked:
            some = {key_id: self._asked.pop(key_id) for key_id in list(islice(self._asked, _KEYS_AT_ONCE))}
            try:
                found = await self._database.ask(lambda connection: _find_keys(connection, list(some)))  # noqa: B023
            except Exception as error:  # noqa: BLE001 - those who asked get it
                for answer in some.values():
                    answer.set_exception(error)
            else:
                for key_id, answer in some.items():
                    answer.set_result(found.get(key_id))


class GatewayCache:
    """Cache of everything that requests need from Postgres: keys, models, engines, usage of the month."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known_engines: Sequence[RowMapping] = ()
        self._keys = _Kept(database, _Keys(database).find)
        self._models = _Kept(database, self._of_workspace(models.find))
        self._all_models = _Kept(database, self._of_workspace(models.of_workspace))
        self._engines = _Kept(database, lambda: database.ask(_live_engines))
        self._months = _Kept(
            database, self._of_workspace(usage.this_month), _MONTH_FRESH_SECONDS, _MONTH_PATIENCE_SECONDS
        )

    def _of_workspace(self, look: Callable[..., Found]) -> Callable[..., Awaitable[Found]]:
        """Return a query that runs in its workspace's places."""
        return lambda workspace_id, *more: self._database.ask(
            lambda connection: look(connection, workspace_id, *more), workspace_id
        )

    async def caller(self, authorization: str | None) -> Caller:
        """Return the caller of an Authorization header.

        Raises:
            Unauthorized: there is no header, or its scheme isn't Bearer.
            InvalidApiKey: it has no live key.
        """
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("Send your API key in the header: Authorization: Bearer KEY.")
        key_id = api_keys.id_of(token)
        found = await self._keys.get(key_id) if key_id else None
        if found is None or not api_keys.matches(found[0], token) or found[1] <= time.monotonic():
            metrics.API_UNKNOWN_KEYS.inc()
            raise InvalidApiKey("The API key is unknown, revoked or expired.")
        return Caller(
            **{name: found[0][name] for name in Caller.__dataclass_fields__ if name != "key_id"}, key_id=found[0]["id"]
        )

    async def model(self, workspace_id: int, name: str) -> RowMapping:
        """Return a model by name or alias.

        Raises:
            ModelNotFound: there is none, or it isn't enabled for this workspace.
        """
        found = await self._models.get(workspace_id, name) if _can_be_a_name(name) else None
        if found is None:
            raise _not_found(name)
        return found

    async def model_or_collection(self, workspace_id: int, name: str) -> RowMapping:
        """Return a model by name or alias, or that of a collection by the collection's name, with the size of its
        vectors as `collection_dimensions`. That is never old: after a swap, queries must be embedded by the model whose
        vectors are read.

        Raises:
            ModelNotFound: there is neither, or the model isn't enabled for this workspace.
            Busy, UpstreamUnavailable: the database doesn't say which model is a collection's.
        """
        found = None
        if _can_be_a_name(name):
            found = await self._models.get(workspace_id, name) or await self._database.ask_within(
                _MOST_SECONDS, lambda connection: models.of_collection(connection, workspace_id, name), workspace_id
            )
        if found is None:
            raise _not_found(name)
        return found

    async def models(self, workspace_id: int) -> Sequence[RowMapping]:
        """Return the models that a workspace may use."""
        return await self._all_models.get(workspace_id)

    async def engines(self) -> Sequence[RowMapping]:
        """Return the live engines: `url, models`. Soon after a failure of the database, add those known before it."""
        found = await self._engines.get()
        if self._database.seconds_since_failure < _ENGINE_GRACE_SECONDS:
            urls = {engine["url"] for engine in found}
            return [*found, *(engine for engine in self._known_engines if engine["url"] not in urls)]
        self._known_engines = found
        return found

    async def month(self, workspace_id: int) -> tuple[int, Decimal]:
        """Return tokens and cost of a workspace in this month, UTC."""
        return await self._months.get(workspace_id)


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f'The model "{name}" is not enabled for your workspace.', param="model")


def _can_be_a_name(name: str) -> bool:
    """Return True if Postgres takes it as a text."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _find_keys(connection: Connection, key_ids: Sequence[str]) -> dict[str, Key]:
    """Return live keys by their ids, each with its expiry on this process's clock."""
    now = time.monotonic()
    return {
        row["id"]: (row, float("inf") if row["seconds_left"] is None else now + float(row["seconds_left"]))
        for row in stored_keys.find_live(connection, key_ids)
    }


def _live_engines(connection: Connection) -> Sequence[RowMapping]:
    return engines.live(connection, _ENGINE_SILENCE_SECONDS)
