"""Playground: search a collection, compare two texts, embed one. Each is metered as the same over the api."""

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, assert_never
from uuid import uuid4

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection, RowMapping

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, show, show_fault
from pipeline.api.dashboard.collections import search
from pipeline.api.dashboard.session import Viewer
from pipeline.api.v1.embeddings import Gateway, embed_body
from pipeline.core.errors import ApiError, UnknownCollection, UserError
from pipeline.core.openai import Embedded
from pipeline.core.vectors import Vectors
from pipeline.db import collections, models
from pipeline.ingest.request import read_fields
from pipeline.jobs.search import SearchRequest

router = APIRouter(route_class=PageRoute, include_in_schema=False)

Trial = Literal["search", "compare", "embed"]

_MOST_FORM_BYTES = 512 * 1024
_FIRST_NUMBERS = 8
_MOST_DIGITS = 18
_TEMPLATE = "playground.html"


@router.get("/playground")
async def show_playground(request: Request) -> Response:
    """Show the forms."""
    return await show(request, _TEMPLATE, partial(_forms, served=await _served(request)))


@router.post("/playground")
async def try_out(request: Request, trial: Trial) -> Response:
    """Do what a form asks for, and show the forms again with what was typed and what was found."""
    session.must_be_ours(request)  # first, since another site's form comes without the cookie
    viewer = await session.viewer(request)
    typed = await _typed(request, viewer)
    try:
        found = await _try(request, viewer, trial, typed)
    except (ApiError, UserError) as error:
        look = partial(_forms, served=await _served(request), trial=trial, typed=typed, fault=str(error))
        return await show_fault(request, _TEMPLATE, look, error)
    look = partial(_forms, served=await _served(request), trial=trial, typed=typed, found=found)
    return await show(request, _TEMPLATE, look)


async def _typed(request: Request, viewer: Viewer) -> dict[str, str]:
    """Return the fields of a form, which may hold long texts, and so waits for a place as large requests do.

    Raises:
        Busy: no place became free in time.
        InvalidPayload, PayloadTooLarge: it isn't a form of ours.
    """
    body = await request.app.state.transfers.body(request, viewer.caller.workspace_id)
    if len(body) > _MOST_FORM_BYTES:
        raise session.too_large(_MOST_FORM_BYTES)
    return session.fields_of(body)


async def _served(request: Request) -> set[str]:
    gateway: Gateway = request.app.state.gateway
    return {name for engine in await gateway.cache.engines() for name in engine["models"]}


def _forms(
    connection: Connection,
    viewer: Viewer,
    *,
    served: set[str],
    trial: Trial | None = None,
    typed: Mapping[str, str] = {},
    found: Any = None,
    fault: str = "",
) -> dict[str, Any]:
    own = viewer.caller.workspace_id
    return {
        "trial": trial,
        "typed": typed,
        "found": found,
        "fault": fault,
        "models": [_with_served(row, served) for row in models.of_workspace(connection, own)],
        "collections": [
            {
                "id": each.id,
                "name": each.name,
                "workspace": None if each.workspace_id == own else collections.workspace_of(connection, each.id),
            }
            for each in collections.of_workspace(connection, viewer.scope)
        ],
    }


def _with_served(row: RowMapping, served: set[str]) -> dict[str, Any]:
    return {
        "name": row["name"],
        "most_tokens": row["max_item_tokens"],
        # An upstream is asked by the api itself.
        "served": row["kind"] == "gateway" or row["name"] in served,
    }


async def _try(request: Request, viewer: Viewer, trial: Trial, typed: Mapping[str, str]) -> Any:
    """Return what a form asks for, as its part of the template shows it.

    Raises:
        ApiError, UserError: the gateway refuses it, or a field is wrong.
    """
    match trial:
        case "search":
            wish = read_fields(SearchRequest, {name: typed.get(name, "") for name in ("query", "limit")})
            return await search(request, viewer, _id_of(typed.get("collection", "")), wish)
        case "compare":
            embedded = [await _embed(request, viewer, typed, name) for name in ("first", "second")]
            return {
                "similarity": cosine(embedded[0].vectors[0], embedded[1].vectors[0]),
                "texts": embedded,
            }
        case "embed":
            one = await _embed(request, viewer, typed, "text")
            return {
                "text": one,
                "dimensions": one.vectors.shape[1],
                "norm": float(np.linalg.norm(one.vectors[0])),
                "first": one.vectors[0][:_FIRST_NUMBERS].tolist(),
                **_same_elsewhere(typed.get("model", ""), typed.get("text", "")),
            }
        case _:
            assert_never(trial)


def _id_of(given: str) -> int:
    if not given.isdecimal() or len(given) > _MOST_DIGITS:
        raise UnknownCollection
    return int(given)


async def _embed(request: Request, viewer: Viewer, typed: Mapping[str, str], name: str) -> Embedded:
    """Embed one text of a form, as a request of its own, by which its own tokens are known and metered."""
    request.scope["state"]["request_id"] = f"req_{uuid4().hex}"
    body = orjson.dumps({"model": typed.get("model", ""), "input": typed.get(name, "")})
    _, embedded, _ = await embed_body(request, viewer.caller, body)
    return embedded


def cosine(one: Sequence[float] | Vectors, other: Sequence[float] | Vectors) -> float:
    """Return the cosine of the angle between two vectors, neither of which is zero."""
    left, right = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.clip(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)), -1, 1))


def _same_elsewhere(model: str, text: str) -> dict[str, str]:
    """Return the same request for curl and for Python, which find address and key in the environment."""
    body = json.dumps({"model": model, "input": text}, ensure_ascii=False)
    address, key = '"$VECTORMILL_API_URL/v1/embeddings"', '"Authorization: Bearer $VECTORMILL_API_KEY"'
    return {
        "curl": f'curl -s {address} -H {key} -H "Content-Type: application/json" -d {shlex.quote(body)}',
        "python": (
            "import os\n"
            "from openai import OpenAI\n\n"
            'client = OpenAI(base_url=os.environ["VECTORMILL_API_URL"] + "/v1", '
            'api_key=os.environ["VECTORMILL_API_KEY"])\n'
            f"vector = client.embeddings.create(model={model!r}, input={text!r}).data[0].embedding"
        ),
    }
