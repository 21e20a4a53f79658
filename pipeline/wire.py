"""OpenAI's wire shape of embeddings, both ends of it: what a request asks, what a reply says. No I/O."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from pipeline.errors import InvalidPayload

#: OpenAI's own limits.
MOST_INPUTS = 2_048
_MOST_USER = 512
_ENCODINGS = ("float", "base64")
Vectors = npt.NDArray[np.float32]
#: Token ids to text; raises ValueError.
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for embeddings."""

    #: As the caller calls it; the reply says the same.
    model: str
    texts: list[str]
    base64: bool
    dimensions: int | None
    #: Whom the caller acts for.
    user: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Vectors of a request's texts, in their order."""

    #: float32 of shape (texts, dimensions).
    vectors: Vectors
    prompt_tokens: int
    #: How many texts were cut at the model's longest.
    truncated: int = 0


def parse_request(body: bytes, most_text_bytes: int, decode: Decode | None = None) -> Asked:
    """Read a request's body. `decode` makes text of OpenAI's token ids, where it is known how.

    Raises:
        InvalidPayload: it isn't one; the message names the field and the index.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidPayload(f"The body isn't valid JSON: {error.msg}.") from None
    if not isinstance(fields, dict):
        raise InvalidPayload("The body must be a JSON object with model and input.")
    model, given = fields.get("model"), fields.get("input")
    if model is None:
        raise InvalidPayload("model is missing from the request body.", param="model")
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        raise InvalidPayload("model must be a string of at most 256 characters.", param="model")
    if given is None:
        raise InvalidPayload("input is missing from the request body.", param="input")
    return Asked(
        model=model,
        texts=_texts(given, most_text_bytes, decode),
        base64=_encoding(fields.get("encoding_format")) == "base64",
        dimensions=_dimensions(fields.get("dimensions")),
        user=_user(fields.get("user")),
    )


def _texts(given: Any, most_bytes: int, decode: Decode | None) -> list[str]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise InvalidPayload("input must be a string or an array of strings.", param="input")
    if not given:
        raise InvalidPayload("input is an empty array.", param="input")
    if _is_token_ids(given):
        given = [given]
    if len(given) > MOST_INPUTS:
        raise InvalidPayload(f"input has {len(given):,} texts; send at most {MOST_INPUTS:,}.", param="input")
    return [_text(one, at, most_bytes, decode) for at, one in enumerate(given)]


def _is_token_ids(given: list[Any]) -> bool:
    return bool(given) and all(type(one) is int for one in given)  # true and false are ints to Python


def _text(one: Any, at: int, most_bytes: int, decode: Decode | None) -> str:
    if isinstance(one, list) and _is_token_ids(one):
        one = _decoded(one, at, decode)
    if not isinstance(one, str):
        raise InvalidPayload(f"input[{at}] isn't a string.", param="input")
    if not one:
        raise InvalidPayload(f"input[{at}] is an empty string.", param="input")
    # No character takes more than four bytes.
    if len(one) * 4 > most_bytes and (size := len(one.encode())) > most_bytes:
        raise InvalidPayload(f"input[{at}] has {size:,} bytes; send at most {most_bytes:,}.", param="input")
    return one


def _decoded(tokens: list[int], at: int, decode: Decode | None) -> str:
    """The text that a client had cut into OpenAI's tokens; they are never the model's own."""
    if decode is None:
        raise InvalidPayload(
            f"input[{at}] is an array of token ids, which this gateway can't read; send text "
            "(in LangChain: check_embedding_ctx_length=False).",
            param="input",
        )
    try:
        return decode(tokens)
    except ValueError:
        raise InvalidPayload(
            f"input[{at}] holds ids that aren't cl100k_base tokens; send text.", param="input"
        ) from None


def _encoding(given: Any) -> str:
    if given is None:
        return "float"
    if given not in _ENCODINGS:
        raise InvalidPayload('encoding_format must be "float" or "base64".', param="encoding_format")
    return str(given)


def _dimensions(given: Any) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InvalidPayload("dimensions must be a whole number above 0.", param="dimensions")
    return given


def _user(given: Any) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or len(given) > _MOST_USER:
        raise InvalidPayload(f"user must be a string of at most {_MOST_USER} characters.", param="user")
    return given.replace("\0", "")


def shortened(vectors: Vectors, dimensions: int) -> Vectors:
    """The first `dimensions` elements of each vector, at length one again."""
    cut = vectors[:, :dimensions]
    return np.ascontiguousarray(cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def make_reply(asked: Asked, embedded: Embedded) -> bytes:
    """The body of a reply, embeddings in index order."""
    vectors = np.ascontiguousarray(embedded.vectors, dtype="<f4")
    rows: Sequence[Any] = [base64.b64encode(row).decode() for row in vectors] if asked.base64 else list(vectors)
    reply = {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(rows)],
        "model": asked.model,
        "usage": {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens},
    }
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def make_error(message: str, code: str, status: int, param: str | None = None) -> bytes:
    """The body of an error."""
    kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    name = kind.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps({"error": {"message": message, "type": name, "param": param, "code": code}})


def pack_vectors(embedded: Embedded) -> bytes:
    """What an engine answers: the length of a JSON object as four bytes, that object, the vectors."""
    about = orjson.dumps(
        {
            "shape": embedded.vectors.shape,
            "prompt_tokens": embedded.prompt_tokens,
            "truncated": embedded.truncated,
        }
    )
    return b"".join((len(about).to_bytes(4, "little"), about, embedded.vectors.astype("<f4", copy=False).tobytes()))


def unpack_vectors(body: bytes) -> Embedded:
    """What an engine's answer says."""
    start = 4 + int.from_bytes(body[:4], "little")
    about = orjson.loads(body[4:start])
    vectors = np.frombuffer(body, dtype="<f4", offset=start).reshape(about["shape"])
    return Embedded(vectors=vectors, prompt_tokens=about["prompt_tokens"], truncated=about["truncated"])
