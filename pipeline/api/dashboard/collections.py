"""Pages of collections: all of them, and one with its history and a search."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Connection

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, show
from pipeline.api.dashboard.session import Viewer
from pipeline.api.dependencies import ask
from pipeline.api.status.search import search_by_engine
from pipeline.core.errors import ApiError, UnknownCollection
from pipeline.db import collections as stored
from pipeline.db.collections import Collection
from pipeline.jobs import collections
from pipeline.jobs.search import Hit, Searchable, SearchRequest, collection_to_search

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_SYNCS = 30
_HITS = 10
Id = Annotated[int, Path(ge=0, lt=2**63)]


@router.get("/collections")
async def show_collections(request: Request) -> Response:
    """Show collections with their size and freshness."""
    return await show(request, "collections.html", _collections)


def _collections(connection: Connection, viewer: Viewer) -> dict[str, Any]:
    found = stored.of_workspace(connection, viewer.scope)
    return {
        "collections": [{"id": each.id, **_shown(connection, each)} for each in found],
        "live": 2,
    }


def _shown(connection: Connection, collection: Collection) -> dict[str, Any]:
    return {
        "collection": collections.collection_status(connection, collection),
        "workspace": stored.workspace_of(connection, collection.id),
    }


@router.get("/collections/{collection_id}")
async def show_collection(
    request: Request, collection_id: Id, q: Annotated[str, Query(max_length=2_000, pattern="^[^\0]*$")] = ""
) -> Response:
    """Show a collection with its history, and what is nearest to a query, which is metered as one over the api."""
    hits, fault = None, None
    if q.strip():
        viewer = await session.viewer(request)
        try:
            hits = await search(request, viewer, collection_id, SearchRequest(query=q.strip(), limit=_HITS))
        except ApiError as error:
            fault = str(error)
    return await show(
        request,
        "collection.html",
        partial(_collection, collection_id=collection_id, query=q.strip(), hits=hits, fault=fault),
    )


def _visible(connection: Connection, viewer: Viewer, collection_id: int) -> Collection:
    found = stored.by_id(connection, collection_id)
    if found is None or not viewer.sees(found.workspace_id):
        raise UnknownCollection
    return found


async def search(request: Request, viewer: Viewer, collection_id: int, wish: SearchRequest) -> list[Hit]:
    """Return what is nearest to a query in a collection that the viewer sees.

    Raises:
        UnknownCollection: there is none.
        UnknownModel: its model is no longer in the catalogue as it was.
        ApiError: as `search_by_engine`.
    """

    def find(connection: Connection) -> Searchable:
        found = _visible(connection, viewer, collection_id)
        return collection_to_search(connection, found.workspace_id, found.name)

    return await search_by_engine(request, viewer.caller, await ask(request, find), wish)


def _collection(
    connection: Connection,
    viewer: Viewer,
    *,
    collection_id: int,
    query: str,
    hits: list[Hit] | None,
    fault: str | None,
) -> dict[str, Any]:
    found = _visible(connection, viewer, collection_id)
    return {
        **_shown(connection, found),
        "syncs": collections.history(connection, found, _SYNCS),
        "query": query,
        "hits": hits,
        "fault": fault,
        # A page that was searched stays as it is, since each query is metered.
        "live": 0 if query else 2,
    }
