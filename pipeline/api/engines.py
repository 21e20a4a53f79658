"""The way to an engine: to the one with the least in flight, and on to the next one when it can't be reached."""

from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus

import aiohttp
import orjson
import structlog
from sqlalchemy import RowMapping

from pipeline.errors import InternalError, UpstreamUnavailable
from pipeline.wire import Embedded, unpack_vectors

log = structlog.get_logger()

_CONNECT_SECONDS = 2.0
#: OpenAI's clients wait as long by themselves.
_MOST_SECONDS = 600.0


class Engines:
    """A client of engines, within a running event loop."""

    def __init__(self) -> None:
        self._in_flight: Counter[str] = Counter()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=_MOST_SECONDS, connect=_CONNECT_SECONDS),
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()

    async def embed(self, engines: Sequence[RowMapping], model: str, texts: Sequence[str]) -> Embedded:
        """Vectors of texts by one of `engines`.

        Raises:
            UpstreamUnavailable: none serves the model, can be reached, or has room.
            InternalError: one failed on these texts.
        """
        serving = [engine["url"] for engine in engines if model in engine["models"]]
        body = orjson.dumps({"model": model, "texts": texts})
        wait = 1.0
        for url in sorted(serving, key=lambda url: self._in_flight[url]):
            self._in_flight[url] += 1
            try:
                async with self._session.post(f"{url}/embed", data=body) as reply:
                    answer = await reply.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("engine_unreachable", engine=url, error=type(error).__name__)
                continue
            finally:
                self._in_flight[url] -= 1
            if reply.status == HTTPStatus.OK:
                return unpack_vectors(answer)
            if reply.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise InternalError("The model failed.")
            wait = float(reply.headers.get("retry-after", wait))
        why = "has no room now" if serving else "is served by no engine now"
        raise UpstreamUnavailable(f'The model "{model}" {why}.', retry_after_seconds=wait)
