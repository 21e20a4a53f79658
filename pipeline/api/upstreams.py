"""The way to a model of kind gateway: on to the API that has it, with the operator's key."""

import asyncio
import time
from collections.abc import Sequence
from http import HTTPStatus

import aiohttp
import structlog

from pipeline.errors import BadReply, InternalError, InvalidPayload, UpstreamUnavailable
from pipeline.jobs import Upstream
from pipeline.settings import read_secret
from pipeline.wire import Embedded, endpoint_of, make_request, most_reply_bytes, parse_reply, told_wait_seconds

log = structlog.get_logger()

_CONNECT_SECONDS = 5.0
_CHARACTERS_PER_TOKEN = 4
#: What passes by itself, as far as a caller can tell.
_UNAVAILABLE = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_TEXTS_FAULT = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY})


class Upstreams:
    """A client of upstream gateways, within a running event loop."""

    def __init__(self, most_seconds: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=most_seconds, connect=_CONNECT_SECONDS),
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()

    async def embed(self, upstream: Upstream, dimensions: int, texts: Sequence[str]) -> Embedded:
        """Vectors of texts.

        Raises:
            UpstreamUnavailable: it can't be reached, or lets nothing through now.
            InvalidPayload: it refuses the texts.
            InternalError: it fails, refuses the operator's key, or answers something else than their embeddings.
        """
        headers = {"content-type": "application/json"}
        if upstream.key_env:
            headers["authorization"] = f"Bearer {_key(upstream.key_env)}"
        most_bytes = most_reply_bytes(len(texts), dimensions)
        try:
            async with self._session.post(
                endpoint_of(upstream.url), data=make_request(upstream, texts), headers=headers, allow_redirects=False
            ) as reply:
                body = await _read(reply, most_bytes) if reply.status == HTTPStatus.OK else b""
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("upstream_unreachable", url=upstream.url, error=type(error).__name__)
            raise UpstreamUnavailable("The model can't be reached now.", retry_after_seconds=1) from error
        if reply.status != HTTPStatus.OK:
            raise _refusal(upstream, reply)
        try:
            # Off the loop: numbers as text take long.
            found = await asyncio.to_thread(parse_reply, body, len(texts), dimensions)
            if found.model not in (None, upstream.model, upstream.reply_model):
                raise BadReply("it is another model's")
        except BadReply as error:
            log.error("upstream_reply_unusable", url=upstream.url, error=str(error))
            raise InternalError("The model's answer can't be used.") from error
        tokens = found.prompt_tokens
        if tokens is None:
            tokens = sum(len(text) // _CHARACTERS_PER_TOKEN + 1 for text in texts)
        return Embedded(vectors=found.vectors, prompt_tokens=tokens, truncated=found.truncated)


def _key(variable: str) -> str:
    key = read_secret(variable)
    if key is None:
        log.error("upstream_key_missing", variable=variable)
        raise InternalError("The gateway isn't set up for this model.")
    return key


async def _read(reply: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    body = bytearray()
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > most_bytes:
            log.error("upstream_reply_unusable", url=str(reply.url), error="it is too long")
            raise InternalError("The model's answer can't be used.")
    return bytes(body)


def _refusal(upstream: Upstream, reply: aiohttp.ClientResponse) -> Exception:
    log.warning("upstream_refuses", url=upstream.url, status=reply.status)
    if reply.status in _UNAVAILABLE:
        told = told_wait_seconds(reply.headers, time.time())
        return UpstreamUnavailable("The model has no room now.", retry_after_seconds=1 if told is None else told)
    if reply.status in _TEXTS_FAULT:
        return InvalidPayload("The model refuses this input; it may be too long.", param="input")
    return InternalError("The model failed.")
