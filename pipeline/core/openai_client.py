"""OpenAI's wire format for embeddings as a client of upstreams speaks it. No I/O."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from math import isfinite, nan
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import orjson

from pipeline.core.errors import BadReply
from pipeline.core.models import Upstream
from pipeline.core.vectors import Vectors

#: Status codes by which an upstream refuses the texts, and not the caller.
TEXTS_FAULT = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY})
#: Timeout for connecting to an upstream.
CONNECT_SECONDS = 5.0
#: First guess, until a model's replies give a better one.
CHARACTERS_PER_TOKEN = 4.0
#: Longest wait that an upstream can ask for; after this it is asked again.
_MOST_WAIT_SECONDS = 3_600.0


def endpoint_of(url: str) -> str:
    """Return the embeddings endpoint of an API, given its address up to `/v1`."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/embeddings"))


def make_request(upstream: Upstream, texts: Sequence[str]) -> bytes:
    """Return the body of a request for vectors with all of the model's dimensions."""
    asked = {
        "model": upstream.model,
        "input": list(texts),
        "encoding_format": "base64" if upstream.base64 else "float",
    }
    return orjson.dumps(asked)


def estimated_tokens(texts: Sequence[str]) -> list[int]:
    """Estimate the number of tokens of each text."""
    return [int(len(text) / CHARACTERS_PER_TOKEN) + 1 for text in texts]


def most_reply_bytes(inputs: int, dimensions: int) -> int:
    """Return the size limit of a reply. It allows for numbers as text with all their digits, and for whatever else a
    provider adds; no honest reply is longer."""
    return inputs * (dimensions * 32 + 1_024) + 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Parsed reply of an upstream."""

    #: float32 of shape (inputs, dimensions), in the order of the inputs.
    vectors: Vectors
    #: Tokens by the upstream's count; `None`: it doesn't say.
    prompt_tokens: int | None
    #: Name that the upstream gives the model.
    model: str | None
    #: Positions of the inputs that the upstream reports as truncated. Only another vectormill does.
    truncated: Sequence[int]


def parse_reply(body: bytes, inputs: int, dimensions: int | None = None, *, asked_bytes: int) -> Reply:
    """Parse the body of a reply to `inputs` inputs.

    Vectors must have `dimensions` elements, or all the same number. A token count that is impossible for a request of
    `asked_bytes` is ignored. Elements may be NaN: the caller finds the texts that they belong to.

    Raises:
        BadReply: the body isn't a list of embeddings, or a vector is missing, comes twice or has another size.
    """
    try:
        fields = _reply_fields(body)
        data, model = fields["data"], fields.get("model")
        usage = fields.get("usage") or {}
        if len(data) != inputs:
            raise BadReply(f"it holds {len(data)} vectors for {inputs} inputs")
        first = _vector(data[0]["embedding"])
        vectors = np.empty((inputs, dimensions or len(first)), dtype=np.float32)
        missing = np.ones(inputs, dtype=np.bool_)
        for one in data:
            index, vector = one["index"], _vector(one["embedding"])
            if type(index) is not int or not 0 <= index < inputs or not missing[index]:
                raise BadReply("an index is out of range or appears twice")
            if len(vector) != vectors.shape[1]:
                raise BadReply(f"a vector has {len(vector)} elements instead of {vectors.shape[1]}")
            vectors[index], missing[index] = vector, False
        truncated = [one["index"] for one in data if one.get("truncated") is True]
        tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise BadReply("it isn't a list of embeddings") from error
    # No tokeniser makes more than one token of a byte; some upstreams prepend an instruction to each text.
    if type(tokens) is not int or not 0 <= tokens <= 4 * asked_bytes + 16 * inputs:
        tokens = None
    return Reply(
        vectors=vectors, prompt_tokens=tokens, model=model if isinstance(model, str) else None, truncated=truncated
    )


def _reply_fields(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)  # it accepts the NaN and Infinity that servers in Python write


def _vector(given: Any) -> Vectors:
    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given, validate=True), dtype="<f4")
    if not isinstance(given, list) or not given:
        raise BadReply("an embedding is neither an array nor base64")
    # Other servers write NaN as null.
    if None in given:
        given = [nan if one is None else one for one in given]
    # No conversion to float32 yet: it would take true for 1 and "2" for 2.
    vector = np.array(given)
    if vector.dtype.kind not in "fi" or vector.ndim != 1:
        raise BadReply("an embedding contains a value that isn't a number")
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def told_wait_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """Return the wait that a reply asks for, an hour at most: `retry-after-ms`, or `retry-after` as seconds or as a
    date. `None` if it asks for none. `now` is Unix time."""
    milliseconds, told = headers.get("retry-after-ms"), headers.get("retry-after")
    for value, unit in ((milliseconds, 1_000.0), (told, 1.0)):
        try:
            wait = float(value or "") / unit
        except ValueError:
            continue
        if isfinite(wait):
            return _bounded(wait)
    try:
        return _bounded(parsedate_to_datetime(told or "").timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _bounded(wait_seconds: float) -> float:
    return min(max(0.0, wait_seconds), _MOST_WAIT_SECONDS)
