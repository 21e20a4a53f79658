"""Embeddings and models of `/v1`. `create_embeddings` and `embed_body` show all steps of a request."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import RowMapping
from starlette.requests import ClientDisconnect

from pipeline.api.dependencies import caller_of
from pipeline.api.gateway.cache import Caller, GatewayCache
from pipeline.api.gateway.engines import Engines
from pipeline.api.gateway.metering import Meter
from pipeline.api.gateway.rate_limits import Limits
from pipeline.api.gateway.upstreams import Upstreams
from pipeline.api.transfers import Transfers
from pipeline.catalog.models import as_upstream
from pipeline.core.errors import BadVector, InvalidPayload
from pipeline.core.openai import Asked, Decode, Embedded, EmbeddingRequest, make_reply, parse_request
from pipeline.core.vectors import shortened, sound
from pipeline.infra import metrics

_JSON = "application/json"
#: Time that engines may take to announce a newly added model.
_JUST_ADDED = timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Services that a request for embeddings uses."""

    cache: GatewayCache
    limits: Limits
    engines: Engines
    upstreams: Upstreams
    meter: Meter
    most_text_bytes: int
    decode: Decode | None


class Embedding(BaseModel):
    """Vector of one text."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str | dict[str, list[float] | str] = Field(
        description="Numbers, or base64 of little-endian float32; of several output types an object of them."
    )
    truncated: bool | None = Field(default=None, description="True: the text was truncated at the model's token limit.")


class Usage(BaseModel):
    """Tokens that were metered."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Embeddings in the order of the input."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorBody(BaseModel):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Error in OpenAI's envelope."""

    error: ErrorBody


class ModelObject(BaseModel):
    """Model that your workspace may use."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "vectormill"
    dimensions: int
    shorter_dimensions: list[int]
    max_tokens: int | None
    query_prompt: str
    document_prompt: str
    price_per_million_tokens: float | None
    aliases: list[str]
    deprecated_at: int | None = Field(description="Unix time by which to use another model; null: it isn't deprecated.")
    replaced_by: str | None = Field(description="The model to use instead.")


class ModelList(BaseModel):
    """Models that your workspace may use."""

    object: str = "list"
    data: list[ModelObject]


#: Error responses of the routes below `/v1`, for the OpenAPI description.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": codes}
    for status, codes in {
        400: "invalid_payload",
        401: "unauthorized, invalid_api_key",
        404: "model_not_found",
        413: "invalid_payload: the body is too large",
        415: "unsupported_media_type: the body's content encoding or charset isn't supported",
        422: "bad_vector: the model's vector of a text is zero or not finite",
        429: "rate_limited",
        500: "internal_error",
        503: "upstream_unavailable",
    }.items()
}
_SECURITY: dict[str, Any] = {"security": [{"bearer": []}]}
router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI-compatible"])


@router.post(
    "/embeddings",
    response_model=EmbeddingList,
    openapi_extra={
        **_SECURITY,
        "requestBody": {"required": True, "content": {_JSON: {"schema": EmbeddingRequest.model_json_schema()}}},
    },
)
async def create_embeddings(request: Request) -> Response:
    """Embed texts: one vector for each, in input order."""
    caller = await caller_of(request, vectors=True)
    transfers: Transfers = request.app.state.transfers
    body = await transfers.body(request, caller.workspace_id)
    asked, embedded, headers = await embed_body(request, caller, body)
    if embedded.truncated:
        headers["x-vectormill-truncated"] = str(len(embedded.truncated))
    if asked.token_ids:
        headers["x-vectormill-token-ids"] = "cl100k_base"
    return Response(make_reply(asked, embedded), media_type=_JSON, headers=headers)


async def embed_body(request: Request, caller: Caller, body: bytes) -> tuple[Asked, Embedded, dict[str, str]]:
    """Embed what the body of a request asks for, as `embed_metered` does. Return also what it asks for.

    Raises:
        ModelNotFound, and as `embed_metered` does.
    """
    gateway: Gateway = request.app.state.gateway
    asked = parse_request(body, gateway.most_text_bytes, gateway.decode)
    model = await gateway.cache.model_or_collection(caller.workspace_id, asked.model)
    if asked.dimensions is None:
        asked = replace(asked, dimensions=model.get("collection_dimensions"))
    embedded, headers = await embed_metered(request, gateway, caller, model, asked)
    return asked, embedded, headers


async def embed_metered(
    request: Request, gateway: Gateway, caller: Caller, model: RowMapping, asked: Asked
) -> tuple[Embedded, dict[str, str]]:
    """Embed what a caller asked for within their limits, and meter it. Return the vectors, and headers that tell the
    limits.

    Raises:
        RateLimited, InvalidPayload, BadVector, UpstreamUnavailable
    """
    dimensions = _dimensions(model, asked.dimensions)
    if not asked.truncates and as_upstream(model):
        told = f"{model['name']} is served by an upstream, which alone knows what it truncates; leave it out."
        raise InvalidPayload(f"truncate: {told}", param="truncate")
    gateway.meter.check()
    estimate = gateway.limits.estimated_tokens(model["name"], model["max_item_tokens"], asked.texts)
    headers = await gateway.limits.charge(caller, estimate)
    embedded = await _unless_gone(request, _embed(gateway, caller, model, asked))
    if dimensions != embedded.vectors.shape[1]:
        embedded = replace(embedded, vectors=shortened(embedded.vectors, dimensions))
    _check(embedded)
    if embedded.truncated and not asked.truncates:
        longer = f"input[{embedded.truncated[0]}] is longer than the {model['max_item_tokens']:,} tokens"
        raise InvalidPayload(f"{longer} that {model['name']} reads; shorten it, or let it be truncated.", param="input")
    gateway.limits.learn(caller, model["name"], asked.texts, estimate, embedded.prompt_tokens)
    metrics.API_TOKENS.labels(model["name"]).inc(embedded.prompt_tokens)
    gateway.meter.add(_usage(request, caller, model, asked, embedded))
    return embedded, headers


async def _embed(gateway: Gateway, caller: Caller, model: RowMapping, asked: Asked) -> Embedded:
    if upstream := as_upstream(model):
        return await gateway.upstreams.embed(upstream, model["dimensions"], asked.texts)
    engines, workspace = await gateway.cache.engines(), str(caller.workspace_id)
    just_added = datetime.now(UTC) - model["added_at"] < _JUST_ADDED
    return await gateway.engines.embed(
        engines,
        model["name"],
        asked.texts,
        weights=model["weights_sha256"],
        queries=asked.queries,
        token_ids=asked.token_ids,
        caller=workspace,
        just_added=just_added,
    )


def _check(embedded: Embedded) -> None:
    bad = np.flatnonzero(~sound(embedded.vectors))
    if len(bad):
        raise BadVector(int(bad[0]))


def _dimensions(model: RowMapping, wanted: int | None) -> int:
    native: int = model["dimensions"]
    sizes = sorted({*model["matryoshka"], native})
    if wanted is None or wanted == native:
        return native
    if wanted not in sizes:
        known = ", ".join(map(str, sizes))
        raise InvalidPayload(f"{model['name']} supports {known} dimensions, not {wanted}.", param="dimensions")
    return wanted


async def _unless_gone(request: Request, work: Any) -> Embedded:
    """Return the result of `work`, or cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(request: Request, caller: Caller, model: RowMapping, asked: Asked, embedded: Embedded) -> Mapping[str, Any]:
    return {
        "workspace_id": caller.workspace_id,
        "key_id": caller.key_id,
        "request_id": request.scope["state"]["request_id"],
        "model": model["name"],
        "items": len(asked.texts),
        "tokens": embedded.prompt_tokens,
        "truncated": len(embedded.truncated),
        "end_user": asked.user,
        "price_per_million": model["price_per_million"],
        "created_at": datetime.now(UTC),
    }


@router.get("/models", response_model=ModelList, openapi_extra=_SECURITY)
async def list_models(request: Request) -> ModelList:
    """List the models that your workspace may use."""
    gateway: Gateway = request.app.state.gateway
    caller = await caller_of(request)
    return ModelList(data=[_model(row, row["name"]) for row in await gateway.cache.models(caller.workspace_id)])


@router.get("/models/{model:path}", response_model=ModelObject, openapi_extra=_SECURITY)
async def retrieve_model(model: str, request: Request) -> ModelObject:
    """Retrieve one model, by id or alias."""
    gateway: Gateway = request.app.state.gateway
    caller = await caller_of(request)
    return _model(await gateway.cache.model_or_collection(caller.workspace_id, model), model)


def _unix(day: date | None) -> int | None:
    return int(datetime.combine(day, time(), UTC).timestamp()) if day else None


def _model(row: RowMapping, called: str) -> ModelObject:
    price = row["price_per_million"]
    return ModelObject(
        id=called,
        created=int(row["added_at"].timestamp()),
        dimensions=row.get("collection_dimensions", row["dimensions"]),
        shorter_dimensions=sorted(row["matryoshka"]),
        max_tokens=row["max_item_tokens"],
        query_prompt=row["query_prompt"],
        document_prompt=row["document_prompt"],
        price_per_million_tokens=None if price is None else float(price),
        aliases=row["aliases"],
        deprecated_at=_unix(row["deprecated_at"]),
        replaced_by=row["replaced_by"],
    )
