"""Search at `/api/collections/NAME/search` and `/api/jobs/JOB/search`: an engine embeds the query."""

from uuid import UUID

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from pipeline.api.dependencies import (
    Workspace,
    ask,
    ask_of_job,
    caller_of,
    described,
    problems,
    read_body,
    scope_or_own,
)
from pipeline.api.gateway.cache import Caller
from pipeline.api.paths import as_sent
from pipeline.api.status.collections import Of
from pipeline.api.v1.embeddings import Gateway, embed_metered
from pipeline.core.openai import Asked
from pipeline.jobs.search import Hit, Hits, Searchable, SearchRequest, collection_to_search, job_to_search

router = APIRouter(prefix="/api", responses=problems(400, 404, 413), tags=["Collections"])


@router.post("/collections/{collection}/search", openapi_extra=described(SearchRequest))
async def search_collection(request: Request, collection: str, workspace: Of = None) -> Hits:
    """Find the keys of a collection nearest to a query, which the collection's model embeds."""
    caller = await caller_of(request, vectors=True)
    wish, name = await read_body(request, SearchRequest), as_sent(collection)

    def find(connection: Connection) -> Searchable:
        scope = scope_or_own(connection, caller, workspace)
        return collection_to_search(connection, scope, name, wish.version)

    return Hits(data=await search_by_engine(request, caller, await ask(request, find), wish))


@router.post("/jobs/{job}/search", openapi_extra=described(SearchRequest))
async def search_job(request: Request, job: str, workspace: Workspace = None) -> Hits:
    """Find the items of a job nearest to a query, by exact cosine similarity."""
    caller = await caller_of(request, vectors=True)

    def find(connection: Connection, job_id: UUID) -> Searchable:
        return job_to_search(connection, job_id)

    wish = await read_body(request, SearchRequest)
    target = await ask_of_job(request, job, find, workspace, caller=caller)
    return Hits(data=await search_by_engine(request, caller, target, wish))


async def search_by_engine(request: Request, caller: Caller, target: Searchable, wish: SearchRequest) -> list[Hit]:
    """Return what is nearest to a query, which an engine or an upstream embeds within the caller's limits.

    Raises: as `create_embeddings`.
    """
    gateway: Gateway = request.app.state.gateway
    await gateway.cache.model(target.workspace_id, target.model["name"])  # which raises if it isn't enabled any more
    asked = Asked(
        model=target.model["name"],
        texts=[wish.query],
        base64=False,
        dimensions=target.dimensions,
        user=None,
        queries=True,
    )
    embedded, _ = await embed_metered(request, gateway, caller, target.model, asked)
    query: list[float] = embedded.vectors[0].tolist()
    return await ask(request, lambda connection: target.nearest(connection, query, wish))
