"""OpenAI's wire format for embeddings as a server speaks it: requests, replies and errors. No I/O."""

import base64
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema

from pipeline.core.errors import InvalidPayload
from pipeline.core.models import MOST_INPUTS
from pipeline.core.vectors import Vectors, quantised

_MOST_USER = 512
_MOST_MODEL = 256
_ENCODINGS = ("float", "base64")
_SEND_TEXT = "send text (in LangChain: check_embedding_ctx_length=False)"
#: Purposes of texts as providers and libraries call them, in lower case → True for a query.
PURPOSES = {
    **dict.fromkeys(("query", "search_query", "retrieval.query", "retrieval_query", "code_retrieval_query"), True),
    **dict.fromkeys(("document", "passage", "search_document", "retrieval.passage", "retrieval_document"), False),
}
#: Fields that say so: of Voyage, NVIDIA and Cohere; of Jina; of Google; of sentence-transformers and TEI.
PURPOSE_FIELDS = ("input_type", "task", "task_type", "prompt_name")
#: Types of a vector's elements in a reply.
OUTPUT_TYPES = ("float", "int8", "uint8", "binary", "ubinary")
_SURROGATE = re.compile("[\ud800-\udfff]")
#: Decoder of token ids into text; raises ValueError.
Decode = Callable[[list[int]], str]


def _listed(given: Any) -> list[Any]:
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
    return given


def _is_token_ids(given: list[Any]) -> bool:
    return bool(given) and all(type(one) is int for one in given)  # true and false are ints to Python


def _model(given: Any) -> str:
    if not isinstance(given, str) or not 0 < len(given) <= _MOST_MODEL:
        raise InvalidPayload(f"model must be a string of at most {_MOST_MODEL} characters.", param="model")
    return given


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
    if _SURROGATE.search(given):
        raise InvalidPayload("user holds half a character (a lone surrogate).", param="user")
    return given.replace("\0", "")


def _purpose_of(field: str) -> BeforeValidator:
    def check(given: Any) -> str | None:
        if given is None:
            return None
        if not isinstance(given, str) or given.lower() not in PURPOSES:
            raise InvalidPayload(f'{field} must be "query" or "document", or a synonym of one.', param=field)
        return given

    return BeforeValidator(check)


def _truncate_of(field: str) -> BeforeValidator:
    def check(given: Any) -> bool:
        wish = given.lower() if isinstance(given, str) else given
        if given is None or wish is True or wish == "end":
            return True
        if wish is False or wish == "none":
            return False
        raise InvalidPayload(f'{field} must be true or "END", or false or "NONE".', param=field)

    return BeforeValidator(check)


def _output_types_of(field: str) -> BeforeValidator:
    def check(given: Any) -> list[str]:
        listed = [given] if isinstance(given, str) else given
        if listed is None:
            return []
        if not isinstance(listed, list) or not listed or any(one not in OUTPUT_TYPES for one in listed):
            raise InvalidPayload(f"{field} must be one or several of {', '.join(OUTPUT_TYPES)}.", param=field)
        return list(dict.fromkeys(listed))

    return BeforeValidator(check)


_OUTPUT_SCHEMA = WithJsonSchema(
    {"anyOf": [{"enum": list(OUTPUT_TYPES)}, {"type": "array", "items": {"enum": list(OUTPUT_TYPES)}, "minItems": 1}]}
)
_TRUNCATE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["END", "NONE"]}]})


class EmbeddingOptions(BaseModel):
    """Options of a request for embeddings, or of a line of a batch request. Other fields are ignored.

    A wrong field raises `InvalidPayload`, which names it.
    """

    model_config = ConfigDict(frozen=True)

    model: Annotated[str, BeforeValidator(_model)] = Field(
        min_length=1, max_length=_MOST_MODEL, description="A model's id, or an alias."
    )
    encoding_format: Annotated[str | None, BeforeValidator(_encoding)] = Field(
        default="float", description="float, or base64 of little-endian float32."
    )
    dimensions: Annotated[int | None, BeforeValidator(_dimensions)] = Field(
        default=None, ge=1, description="Size of the vectors, if the model supports several."
    )
    user: Annotated[str | None, BeforeValidator(_user)] = Field(
        default=None, max_length=_MOST_USER, description="Your end user; stored with the usage."
    )
    input_type: Annotated[str | None, _purpose_of("input_type")] = Field(
        default=None,
        description="query: embed with the model's query prompt; otherwise with its document prompt.",
    )
    task: Annotated[str | None, _purpose_of("task")] = Field(
        default=None, description="As input_type: retrieval.query, retrieval.passage."
    )
    task_type: Annotated[str | None, _purpose_of("task_type")] = Field(
        default=None, description="As input_type: RETRIEVAL_QUERY, RETRIEVAL_DOCUMENT."
    )
    prompt_name: Annotated[str | None, _purpose_of("prompt_name")] = Field(
        default=None, description="As input_type: the prompt's name."
    )
    truncate: Annotated[bool, _truncate_of("truncate"), _TRUNCATE_SCHEMA] = Field(
        default=True, description="false or NONE: refuse a text that is longer than the model reads."
    )
    truncation: Annotated[bool, _truncate_of("truncation"), _TRUNCATE_SCHEMA] = Field(
        default=True, description="As truncate."
    )
    output_dtype: Annotated[list[str], _output_types_of("output_dtype"), _OUTPUT_SCHEMA] = Field(
        default=[],
        description="Types of the elements. Of several, embedding is an object of them. int8 and uint8 are scaled "
        "for each vector, so they are compared by cosine; binary and ubinary hold eight signs a byte.",
    )
    embedding_types: Annotated[list[str], _output_types_of("embedding_types"), _OUTPUT_SCHEMA] = Field(
        default=[], description="As output_dtype."
    )

    @property
    def are_queries(self) -> bool:
        """True if the texts are queries; otherwise they are documents.

        Raises:
            InvalidPayload: two fields contradict each other.
        """
        given = {name: value for name in PURPOSE_FIELDS if (value := getattr(self, name)) is not None}
        said = {PURPOSES[value.lower()] for value in given.values()}
        if len(said) > 1:
            last = list(given)[-1]
            raise InvalidPayload(f"{' and '.join(given)} contradict each other; send one of them.", param=last)
        return said == {True}

    @property
    def truncates(self) -> bool:
        """True if texts that are too long are truncated; otherwise they are refused."""
        return self.truncate and self.truncation

    @property
    def output_types(self) -> list[str]:
        """Types of the elements that are asked for; at least one."""
        return self.output_dtype or self.embedding_types or ["float"]


_TEXTS_OR_TOKENS = str | list[str] | list[int] | list[list[int]]


class EmbeddingRequest(EmbeddingOptions):
    """Request for embeddings. Other fields are ignored."""

    #: Always a list; its elements are checked one by one, when `parse_request` turns them into texts.
    input: Annotated[
        list[Any],
        BeforeValidator(_listed),
        WithJsonSchema(TypeAdapter(_TEXTS_OR_TOKENS).json_schema()),
    ] = Field(description=f"A text, or up to {MOST_INPUTS:,} of them; or ids of cl100k_base tokens.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Parsed request for embeddings."""

    #: Name of the model as the caller wrote it; the reply repeats it.
    model: str
    texts: list[str]
    base64: bool
    dimensions: int | None
    #: User for whom the caller acts.
    user: str | None
    #: True if the texts are queries; otherwise they are documents.
    queries: bool = False
    #: False: a text that the model can't read whole is refused.
    truncates: bool = True
    #: Types of the reply's elements, of `OUTPUT_TYPES`.
    output_types: Sequence[str] = ("float",)
    #: Ids, by position, of the texts that came as ids of OpenAI's tokens.
    token_ids: Mapping[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Vectors of a request's texts, in their order."""

    #: float32 of shape (texts, dimensions).
    vectors: Vectors
    prompt_tokens: int
    #: Positions of the texts that were truncated to the model's limit.
    truncated: Sequence[int] = ()


def parse_request(body: bytes, most_text_bytes: int, decode: Decode | None = None) -> Asked:
    """Parse a request's body. `decode` turns OpenAI's token ids into text; without it they are refused.

    Raises:
        InvalidPayload: the body isn't a valid request; the message names the field and the index.
    """
    fields = _fields(body)
    if not isinstance(fields, dict):
        raise InvalidPayload("The body must be a JSON object with model and input.")
    for name in ("model", "input"):
        if fields.get(name) is None:
            raise InvalidPayload(f"{name} is missing from the request body.", param=name)
    request = EmbeddingRequest.model_validate(fields)
    return Asked(
        model=request.model,
        texts=[_text(one, at, most_text_bytes, decode) for at, one in enumerate(request.input)],
        base64=request.encoding_format == "base64",
        dimensions=request.dimensions,
        user=request.user,
        queries=request.are_queries,
        truncates=request.truncates,
        output_types=tuple(request.output_types),
        token_ids={at: one for at, one in enumerate(request.input) if isinstance(one, list)},
    )


def _fields(body: bytes) -> Any:
    # Windows programs put a byte-order mark first.
    body = body.removeprefix(BOM_UTF8)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _no_json(body, error) from None


def _no_json(body: bytes, error: orjson.JSONDecodeError) -> InvalidPayload:
    """Return the error for a body that isn't JSON, found with a more lenient parser."""
    try:
        fields = json.loads(body.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as broken:
        return InvalidPayload(f"The body isn't UTF-8 (at byte {broken.start:,}); send JSON in UTF-8.")
    except (ValueError, RecursionError):
        fields = None
    for name, value in fields.items() if isinstance(fields, dict) else ():
        for at, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, str) and (found := _SURROGATE.search(one)):
                where = f"input[{at}]" if name == "input" else name
                told = f"{where} holds half a character (a lone surrogate, at character {found.start():,})"
                return InvalidPayload(f"{told}, which no text has: was it cut there?", param=name)
    return InvalidPayload(f"The body isn't valid JSON: {error.msg}.")


def _text(one: Any, at: int, most_bytes: int, decode: Decode | None) -> str:
    if isinstance(one, list) and _is_token_ids(one):
        one = _decoded(one, at, decode)
    if not isinstance(one, str):
        raise InvalidPayload(f"input[{at}] isn't a string.", param="input")
    if not one:
        raise InvalidPayload(f"input[{at}] is an empty string.", param="input")
    # No character takes more than four bytes, so short texts needn't be encoded.
    if len(one) * 4 > most_bytes and (size := len(one.encode())) > most_bytes:
        raise InvalidPayload(f"input[{at}] has {size:,} bytes; send at most {most_bytes:,}.", param="input")
    return one


def _decoded(tokens: list[int], at: int, decode: Decode | None) -> str:
    """Decode a text that a client sent as OpenAI's token ids. Ids of other vocabularies are refused as far as the
    decoded bytes show it; an engine checks if they are its model's own."""
    if decode is None:
        raise InvalidPayload(
            f"input[{at}] is an array of token ids, which this gateway can't read; {_SEND_TEXT}.", param="input"
        )
    try:
        return decode(tokens)
    except ValueError:
        raise InvalidPayload(
            f"input[{at}] holds ids that aren't cl100k_base tokens of a text, and no others are read; {_SEND_TEXT}.",
            param="input",
        ) from None


def make_reply(asked: Asked, embedded: Embedded) -> bytes:
    """Return the body of a reply, embeddings in index order. A truncated text is marked beside its embedding."""
    rows = {kind: _rows(embedded.vectors, kind, asked) for kind in asked.output_types}
    data: list[dict[str, Any]] = [
        {
            "object": "embedding",
            "index": at,
            "embedding": one[0] if len(one) == 1 else dict(zip(rows, one, strict=True)),
        }
        for at, one in enumerate(zip(*rows.values(), strict=True))
    ]
    for at in embedded.truncated:
        data[at]["truncated"] = True
    reply = {
        "object": "list",
        "data": data,
        "model": asked.model,
        "usage": {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens},
    }
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _rows(vectors: Vectors, kind: str, asked: Asked) -> Sequence[Any]:
    """Return vectors as a reply holds them: floats as numbers or base64, other types always as numbers, since OpenAI's
    SDK asks for base64 unasked and takes it for floats."""
    if kind != "float":
        return list(quantised(vectors, kind))
    floats = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row).decode() for row in floats] if asked.base64 else list(floats)


def make_error(message: str, code: str, status: int, param: str | None = None) -> bytes:
    """Return the body of an error reply."""
    kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    name = kind.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps({"error": {"message": message, "type": name, "param": param, "code": code}})


def pack_vectors(embedded: Embedded) -> bytes:
    """Serialise an engine's answer: the length of a JSON object as four bytes, that object, the vectors."""
    about = orjson.dumps(
        {
            "shape": embedded.vectors.shape,
            "prompt_tokens": embedded.prompt_tokens,
            "truncated": embedded.truncated,
        }
    )
    return b"".join((len(about).to_bytes(4, "little"), about, embedded.vectors.astype("<f4", copy=False).tobytes()))


def unpack_vectors(body: bytes) -> Embedded:
    """Deserialise an engine's answer, made by `pack_vectors`."""
    start = 4 + int.from_bytes(body[:4], "little")
    about = orjson.loads(body[4:start])
    vectors = np.frombuffer(body, dtype="<f4", offset=start).reshape(about["shape"])
    return Embedded(vectors=vectors, prompt_tokens=about["prompt_tokens"], truncated=about["truncated"])
