"""Client of engines: sends a request to the one with the fewest in flight, and fails over to the next one."""

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
#: Total timeout of a request to an engine, which is also the default of OpenAI's clients.
MOST_SECONDS = 600.0
#: Losses after which a request isn't retried. One engine may have been about to end; two were ended by the request.
_MOST_LOST = 2
#: Time in which an engine that died starts again and loads its model.
_BACK_SECONDS = 10.0
#: Timeout of a lost request that waits for other retries to go before it, which wait for the engine.
_ALONE_SECONDS = 2 * _BACK_SECONDS
#: Interval between health checks of an engine that broke off.
_PERIOD_SECONDS = 1.0


class _Outcome(Enum):
    """Reason that an engine gave no vectors."""

    UNREACHABLE = auto()
    #: The engine has another secret.
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
#: Status of an engine's refusal of a text → error. The reply's body is the text's position.
_OF_TEXTS: dict[int, type[BadVector | ModelsOwnTokens]] = {each.status: each for each in (BadVector, ModelsOwnTokens)}


class Engines:
    """Client of engines, within a running event loop."""

    def __init__(self, secret: SecretStr | None = None) -> None:
        self._headers = {"authorization": engine_authorization(secret)}
        self._in_flight: Counter[str] = Counter()
        #: Model → lock of its lost requests: they are retried one by one, so that a text that ends its engine does so
        #: alone.
        self._again: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        #: Engines that broke off, or can't be reached, until they answer, also while they load: others are tried first.
        self._broken: dict[str, asyncio.Task[None]] = {}
        self._session = _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        #: Session for retries, which keeps no connections: a kept one may lead to the same process, and not be known as
        #: broken yet.
        self._anew = _session(aiohttp.TCPConnector(limit=0, force_close=True))

    async def close(self) -> None:
        """Cancel the health checks and close the connections."""
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
        """Embed texts by one of `engines`, as queries or as documents.

        Args:
            weights: SHA-256 of the weights that the model must have there.
            token_ids: OpenAI's token ids of the texts that came as such, by position.
            caller: any name; engines give callers equal shares.
            just_added: if no engine announces the model, ask them all, since they may not have done so yet.

        Raises:
            UpstreamUnavailable: no engine serves the model, can be reached, or has room.
            PayloadTooLarge: the texts are larger than the engine takes.
            ModelsOwnTokens: the ids are of the model's own vocabulary.
            BadVector: the vector of one text is zero or not finite.
            InternalError: an engine failed on these texts, or none can load the model.
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
                # Retry it last: its process is being replaced, and the other engines may be gone too.
                line.append(url)
        raise _refusal(model, outcomes, wait)

    @asynccontextmanager
    async def _alone(self, model: str) -> AsyncIterator[None]:
        """Hold the lock of the model's retries; after a timeout, go on without it."""
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
        """Wait until an engine that broke off answers, at most as long as a request may take; then trust it again."""
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
        """Return the engine's answer, and the wait in seconds that it asks for."""
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
    """Return the error for the outcomes of the engines asked. The one that may pass soonest comes first."""
    if outcomes[_Outcome.FULL]:
        return UpstreamUnavailable(f'The model "{model}" is at capacity.', retry_after_seconds=wait)
    if outcomes[_Outcome.LOST]:
        return UpstreamUnavailable(
            f'The connection to the engine of the model "{model}" was lost.', retry_after_seconds=wait
        )
    if outcomes[_Outcome.REFUSING]:
        return UpstreamUnavailable("The gateway and its engines don't share a secret.", retry_after_seconds=wait)
    if outcomes[_Outcome.UNREACHABLE]:
        return UpstreamUnavailable(f'No engine of the model "{model}" can be reached now.', retry_after_seconds=wait)
    if outcomes[_Outcome.CANT_LOAD]:
        return InternalError(f'The model "{model}" can\'t be loaded.')
    return UpstreamUnavailable(f'No engine serves the model "{model}" now.', retry_after_seconds=wait)
