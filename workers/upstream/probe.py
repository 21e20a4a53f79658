"""Probes of an upstream: a description of its model for the catalogue, and vectors of a few texts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.core.canary import CANARY, is_canary
from pipeline.core.errors import ModelError
from pipeline.core.models import Upstream
from pipeline.core.openai_client import TEXTS_FAULT, Reply, estimated_tokens
from workers.upstream.client import Answer, UpstreamClient, key_of

_SECONDS = 60.0
_USUAL_TEXT = "A sentence of a usual length, as it stands in the documents that people embed. " * 4
_USUAL_TEXTS = 32


def describe(upstream: Upstream) -> dict[str, object]:
    """Return an upstream's model as the catalogue records it, by two requests; three if it refuses base64.

    Raises:
        ModelError: the upstream can't be reached, or its answer isn't embeddings.
        GatewayRefused: its key isn't set here.
    """
    answer = _ask(upstream, [CANARY])
    if answer.status in TEXTS_FAULT:
        upstream = replace(upstream, base64=False)
        answer = _ask(upstream, [CANARY])
    reply = _reply_of(upstream, answer)
    canary = reply.vectors[0]
    if not is_canary(canary, canary.tobytes()):
        raise ModelError(f"{upstream.url}: the canary text's vector is zero or not finite.")
    usual = [_USUAL_TEXT] * min(_USUAL_TEXTS, upstream.request_inputs)
    many = _ask(upstream, usual)
    tokens = _reply_of(upstream, many).prompt_tokens or sum(estimated_tokens(usual))
    return {
        "reply_model": reply.model,
        "base64": upstream.base64,
        "dimensions": len(canary),
        "normalised": bool(abs(float(np.linalg.norm(canary)) - 1) < 1e-3),
        "canary": canary.astype("<f4").tobytes().hex(),
        "tokens_per_second": round(tokens / many.seconds, 1),
    }


def embed_now(upstream: Upstream, texts: Sequence[str]) -> list[list[float]]:
    """Return the vectors of a few texts, by one request.

    Raises:
        ModelError: the upstream gives none.
        GatewayRefused: its key isn't set here.
    """
    vectors: list[list[float]] = _reply_of(upstream, _ask(upstream, texts)).vectors.tolist()
    return vectors


def _ask(upstream: Upstream, texts: Sequence[str]) -> Answer:
    with UpstreamClient(upstream, seconds=_SECONDS, in_flight=1) as connection:
        return connection.post(key_of(upstream), texts, None)


def _reply_of(upstream: Upstream, answer: Answer) -> Reply:
    if answer.reply is None:
        raise ModelError(f"{upstream.url} {answer.trouble or 'gives no embeddings'}.")
    return answer.reply
