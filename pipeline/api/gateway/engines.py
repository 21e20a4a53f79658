"""The way to an engine: to the one with the least in flight, and on to the next one when it can't take the request."""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from enum import Enum, auto
from http import HTTPStatus

import aiohttp
import orjson
import structlog
from pydantic import SecretStr
from sqlalchemy import RowMapping

from pipeline.core.errors import (
    ApiError,
    BadVector,
    InternalError,
    ModelsOwnTokens,
    PayloadTooLarge,
    UpstreamUnavailable,
)
from pipeline.core.openai import Embedded, unpack_vectors
from pipeline.infra.settings import engine_authorization

log = structlog.get_logger()

_CONNECT_SECONDS = 2.0
#: OpenAI's clients wait as long by themselves.
MOST_SECONDS = 600.0
#: How often a request may be lost: one engine may have been about to end, two are ended by the request.
_MOST_LOST = 2
#: In which time an engine that died is back: it starts, and loads its model.
_BACK_SECONDS = 10.0
#: How long a request that was lost waits for others to be asked again before it: they wait for the engine.
_ALONE_SECONDS = 2 * _BACK_SECONDS
#: How often an engine that broke off is asked whether it answers again.
_PERIOD_SECONDS = 1.0


class _Outcome(Enum):
    """Why an engine gave no vectors."""

    UNREACHABLE = auto()
    #: It knows another secret.
    REFUSING = auto()
    LOST = auto()
    FULL = auto()
    UNKNOWN = auto()
    CANT_LOAD = auto()


_OUTCOMES: dict[int, _Outcome] = {
    HTTPStatus.SERVICE_UNAVAILABLE: _Outcome.FULL,
    HTTPStatus.UNAUTHORIZED: _Outcome.REFUSING,
    HTTPStatus.NOT_FOUND: _Outcome.UNKNOWN,
    HTTPStatus.FAILED_DEPENDENCY: _Outcome.CANT_LOAD,
}
#: What an engine refuses a text for, whose position is its answer.
_OF_TEXTS: dict[int, type[BadVector | ModelsOwnTokens]] = {each.status: each for each in (BadVector, ModelsOwnTokens)}


class Engines:
    """A client of engines, within a running event loop."""

    def __init__(self, secret: SecretStr | None = None) -> None:
        self._headers = {"authorization": engine_authorization(secret)}
        self._in_flight: Counter[str] = Counter()
        #: Of those of a model that were lost one is asked again at a time: a text that ends its engine does so alone.
        self._again: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        #: Engines that broke off, or can't be reached, until they answer: others come first, also while one loads.
        self._broken: dict[str, asyncio.Task[None]] = {}
        self._session = _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        #: For what was lost: a connection that was kept may be to the same process, and not be known as broken yet.
        self._anew = _session(aiohttp.TCPConnector(limit=0, force_close=True))

    async def close(self) -> None:
        """Close its connections."""
        for task in self._broken.values():
            task.cancel()
        await self._session.close()
        await self._anew.close()

    async def embed(
        self,
        engines: Sequence[RowMapping],
        model: str,
        texts: Sequence[str],
        *,
        weights: str,
        queries: bool = False,
        token_ids: Mapping[int, list[int]] | None = None,
        caller: str,
        just_added: bool = False,
    ) -> Embedded:
        """Vectors of texts by one of `engines`, read as queries or as documents.
        `weights`: the SHA-256 of those that the model must have there.
        `token_ids`: of those that came as ids of OpenAI's tokens, by position. Engines give callers equal shares,
        whoever these are. A model that was just added is asked of engines that don't say yet that they serve it.

        Raises:
            UpstreamUnavailable: none serves the model, can be reached, or has room.
            ModelsOwnTokens: the ids are the model's own.
            BadVector: the vector of one of them is zero or not finite.
            InternalError: one failed on these texts, or none can load the model.
        """
        serving = [engine["url"] for engine in engines if model in engine["models"]]
        if just_added and not serving:
            serving = [engine["url"] for engine in engines]
        asked = {
            "model": model,
            "weights": weights,
            "texts": texts,
            "queries": queries,
            "token_ids": token_ids or {},
            "caller": caller,
        }
        body = orjson.dumps(asked, option=orjson.OPT_NON_STR_KEYS)
        outcomes: Counter[_Outcome] = Counter()
        wait = _BACK_SECONDS
        line = deque(sorted(serving, key=lambda url: (url in self._broken, self._in_flight[url])))
        while line:
            url = line.popleft()
            async with self._alone(model) if outcomes[_Outcome.LOST] else nullcontext():
                answer, told = await self._ask(self._anew if outcomes[_Outcome.LOST] else self._session, url, body)
            if isinstance(answer, Embedded):
                return answer
            outcomes[answer] += 1
            wait = told or wait
            if outcomes[_Outcome.LOST] == _MOST_LOST:
                break
            if answer is _Outcome.LOST:
                # Its process is replaced, and others may have gone.
                line.append(url)
        raise _refusal(model, outcomes, wait)

    @asynccontextmanager
    async def _alone(self, model: str) -> AsyncIterator[None]:
        """Wait for others of the model that are asked again, but for so long only."""
        lock = self._again[model]
        try:
            async with asyncio.timeout(_ALONE_SECONDS):
                await lock.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            lock.release()

    async def _answers_again(self, url: str) -> None:
        """Wait until an engine that broke off answers, or has been gone for as long as anything is waited for."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(MOST_SECONDS):
                    while not await self._is_healthy(url):
                        await asyncio.sleep(_PERIOD_SECONDS)
        finally:
            del self._broken[url]

    async def _is_healthy(self, url: str) -> bool:
        try:
            async with self._session.get(f"{url}/healthz"):
                return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _note_broken(self, url: str) -> None:
        if url not in self._broken:
            self._broken[url] = asyncio.create_task(self._answers_again(url))

    async def _ask(
        self, session: aiohttp.ClientSession, url: str, body: bytes
    ) -> "tuple[Embedded | _Outcome, float | None]":
        """Its answer, and how long it says to wait."""
        self._in_flight[url] += 1
        try:
            async with session.post(f"{url}/embed", data=body, headers=self._headers) as reply:
                content = await reply.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            log.warning("engine_unreachable", engine=url, error=type(error).__name__)
            self._note_broken(url)
            return _Outcome.UNREACHABLE, None
        except aiohttp.ClientError as error:
            log.warning("engine_lost", engine=url, error=type(error).__name__)
            self._note_broken(url)
            return _Outcome.LOST, None
        except TimeoutError as error:
            raise UpstreamUnavailable("The model took too long.", retry_after_seconds=1) from error
        finally:
            self._in_flight[url] -= 1
        if reply.status == HTTPStatus.OK:
            return unpack_vectors(content), None
        if reply.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise PayloadTooLarge("The texts are larger than the model's engine takes; send less in a request.")
        if reply.status == HTTPStatus.UNAUTHORIZED:
            log.error("engine_refuses_secret", engine=url)
        if outcome := _OUTCOMES.get(reply.status):
            told = reply.headers.get("retry-after")
            return outcome, float(told) if told else None
        if refusal := _OF_TEXTS.get(reply.status):
            raise refusal(int(content))
        raise InternalError("The model failed.")


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=MOST_SECONDS, connect=_CONNECT_SECONDS)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)


def _refusal(model: str, outcomes: "Counter[_Outcome]", wait: float) -> ApiError:
    """What is true of the engines that were asked. The first that holds is what may pass soonest."""
    if outcomes[_Outcome.FULL]:
        return UpstreamUnavailable(f'The model "{model}" has no room now.', retry_after_seconds=wait)
    if outcomes[_Outcome.LOST]:
        return UpstreamUnavailable(f'The engine of the model "{model}" broke off.', retry_after_seconds=wait)
    if outcomes[_Outcome.REFUSING]:
        return UpstreamUnavailable("The gateway and its engines don't share a secret.", retry_after_seconds=wait)
    if outcomes[_Outcome.UNREACHABLE]:
        return UpstreamUnavailable(f'No engine of the model "{model}" can be reached now.', retry_after_seconds=wait)
    if outcomes[_Outcome.CANT_LOAD]:
        return InternalError(f'The model "{model}" can\'t be loaded.')
    return UpstreamUnavailable(f'The model "{model}" is served by no engine now.', retry_after_seconds=wait)
