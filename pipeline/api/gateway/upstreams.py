"""Client of upstreams: forwards requests for a model of kind gateway, with the operator's key."""

import asyncio
import time
from collections.abc import Sequence
from http import HTTPStatus

import aiohttp
import numpy as np
import structlog

from pipeline.core.errors import BadReply, InternalError, InvalidPayload, UpstreamUnavailable
from pipeline.core.models import Upstream
from pipeline.core.openai import Embedded
from pipeline.core.openai_client import (
    CONNECT_SECONDS,
    TEXTS_FAULT,
    endpoint_of,
    estimated_tokens,
    make_request,
    most_reply_bytes,
    parse_reply,
    told_wait_seconds,
)
from pipeline.infra.settings import read_key
from pipeline.ingest.chunking import request_batches

log = structlog.get_logger()

#: Concurrent requests to an upstream for one request of a caller.
_IN_FLIGHT = 4
#: Statuses of failures that are temporary, as far as a caller can tell.
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


class Upstreams:
    """Client of upstreams, within a running event loop."""

    def __init__(self, most_seconds: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=most_seconds, connect=CONNECT_SECONDS),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def embed(self, upstream: Upstream, dimensions: int, texts: Sequence[str]) -> Embedded:
        """Embed texts, in as many requests as the upstream's limits require.

        Raises:
            UpstreamUnavailable: the upstream can't be reached, or lets nothing through now.
            InvalidPayload: it refuses the texts.
            InternalError: it fails, refuses the operator's key, or answers something else than their embeddings; or
                the key isn't set.
        """
        lengths = np.array(estimated_tokens(texts), np.int32)
        starts = [int(at[0]) for at in request_batches(lengths, upstream.request_tokens, upstream.request_inputs)]
        room = asyncio.Semaphore(_IN_FLIGHT)

        async def ask(start: int, stop: int) -> Embedded:
            async with room:
                return await self._ask(upstream, dimensions, texts[start:stop])

        asking = [asyncio.ensure_future(ask(*ends)) for ends in zip(starts, [*starts[1:], len(texts)], strict=True)]
        try:
            return _joined(starts, await asyncio.gather(*asking))
        finally:
            for one in asking:
                one.cancel()

    async def _ask(self, upstream: Upstream, dimensions: int, texts: Sequence[str]) -> Embedded:
        headers = {"content-type": "application/json"}
        if upstream.key_env:
            headers["authorization"] = f"Bearer {_key(upstream.key_env)}"
        most_bytes, asked = most_reply_bytes(len(texts), dimensions), make_request(upstream, texts)
        try:
            async with self._session.post(
                endpoint_of(upstream.url), data=asked, headers=headers, allow_redirects=False
            ) as reply:
                body = await _read(reply, most_bytes) if reply.status == HTTPStatus.OK else b""
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("upstream_unreachable", url=upstream.url, error=type(error).__name__)
            raise UpstreamUnavailable("The model can't be reached now.", retry_after_seconds=1) from error
        if reply.status != HTTPStatus.OK:
            raise _refusal(upstream, reply)
        try:
            # Off the event loop: parsing numbers from text takes long.
            return await asyncio.to_thread(_embedded, upstream, body, texts, dimensions, len(asked))
        except BadReply as error:
            log.error("upstream_reply_unusable", url=upstream.url, error=str(error))
            raise InternalError("The model's answer can't be used.") from error


def _embedded(upstream: Upstream, body: bytes, texts: Sequence[str], dimensions: int, asked_bytes: int) -> Embedded:
    found = parse_reply(body, len(texts), dimensions, asked_bytes=asked_bytes)
    if found.model not in (None, upstream.model, upstream.reply_model):
        raise BadReply("it is another model's")
    tokens = sum(estimated_tokens(texts)) if found.prompt_tokens is None else found.prompt_tokens
    return Embedded(vectors=found.vectors, prompt_tokens=tokens, truncated=found.truncated)


def _joined(starts: Sequence[int], parts: Sequence[Embedded]) -> Embedded:
    """Join the replies to consecutive texts; `starts`: the position of each reply's first text."""
    return Embedded(
        vectors=np.concatenate([part.vectors for part in parts]),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        truncated=[start + at for start, part in zip(starts, parts, strict=True) for at in part.truncated],
    )


def _key(variable: str) -> str:
    key = read_key(variable)
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
        return UpstreamUnavailable("The model is at capacity.", retry_after_seconds=1 if told is None else told)
    if reply.status in TEXTS_FAULT:
        return InvalidPayload("The model refuses this input; it may be too long.", param="input")
    return InternalError("The model failed.")
