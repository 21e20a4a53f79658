"""Command `vectormill search`: what is nearest to a query, in a job or a collection."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipeline.catalog.models import DEFAULT_WORKSPACE, as_model, portable
from pipeline.cli import output
from pipeline.cli.api_backend import ApiBackend
from pipeline.cli.backends import open_backend
from pipeline.cli.context import CommandContext
from pipeline.cli.database_backend import DatabaseBackend
from pipeline.cli.jobs import tell_namesakes
from pipeline.cli.oneshot import oneshot
from pipeline.cli.options import Json, Workspace
from pipeline.cli.submit import needs
from pipeline.core.collections import VersionState
from pipeline.core.errors import ServiceUnreachable, UserError
from pipeline.embedded.runtime import find_running
from pipeline.ingest.request import read_fields
from pipeline.jobs import status
from pipeline.jobs.search import Hit, Searchable, SearchRequest, collection_to_search, job_to_search

_KEY_WIDTH = 40


def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.")],
    job: Annotated[str | None, typer.Option(help="The job to search in: id, unique prefix of it, or name.")] = None,
    collection: Annotated[str | None, typer.Option(help="The collection to search in, instead of a job.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only what carries this value; may be repeated."),
    ] = None,
    version: Annotated[
        VersionState,
        typer.Option(metavar="current|next|previous", help="The collection's version to search."),
    ] = VersionState.CURRENT,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many results.")] = 5,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Find what is nearest to a query by cosine similarity: keys of a collection, or items of a job.

    Examples:

        vectormill search "refund after a late delivery" --collection tickets --where lang=en

        vectormill search "read a file line by line" --job docs
    """
    if (job is None) == (collection is None):
        raise UserError("give either --collection or --job, to search in.")
    needs("--version", version is not VersionState.CURRENT, "--collection", collection is not None)
    asked = {"query": query, "limit": limit, "where": _conditions(where or []), "version": version}
    wish = read_fields(SearchRequest, asked)
    with open_backend(workspace) as backend:
        if job is not None:
            tell_namesakes(backend, job)
        if isinstance(backend, ApiBackend):
            hits = backend.search(wish, job=job, collection=collection)
        else:
            hits = _search_here(backend, [wish], job, collection, workspace)[0]
    if as_json:
        output.print_json([hit.model_dump(mode="json", exclude_none=True) for hit in hits])
    elif hits:
        output.stdout.print(hit_table(hits))
    else:
        output.stderr.print("Nothing found.")


def _conditions(pairs: list[str]) -> dict[str, str]:
    conditions = {}
    for pair in pairs:
        column, equals, value = pair.partition("=")
        if not column or not equals:
            raise UserError(f'--where "{pair}": write it as column=value.')
        if column in conditions:
            raise UserError(f'--where "{pair}": {column} is given twice.')
        conditions[column] = value
    return conditions


def search_collection(
    backend: DatabaseBackend | ApiBackend, wishes: list[SearchRequest], collection: str, workspace: str
) -> list[list[Hit]]:
    """Return what each query finds in the same version of a collection."""
    if isinstance(backend, ApiBackend):
        return [backend.search(wish, collection=collection) for wish in wishes]
    return _search_here(backend, wishes, None, collection, workspace)


def _search_here(
    backend: DatabaseBackend, wishes: list[SearchRequest], job: str | None, collection: str | None, workspace: str
) -> list[list[Hit]]:
    """Search by the api of an `up` that runs here, whose engine has loaded the model; else load it for this."""
    running = find_running(backend.place.settings.home)
    uses_it = running and running.ready and not backend.place.settings.database_url
    if running and uses_it:
        api = ApiBackend(running.api_url, running.api_key, workspace)
        try:
            return [api.search(wish, job=job, collection=collection) for wish in wishes]
        except ServiceUnreachable as error:
            output.stderr.print(f"{error} The model is loaded for this query instead.", markup=False)
        finally:
            api.close()
    return search_many(backend.place, wishes, job=job, collection=collection)


def search_many(
    place: CommandContext, wishes: list[SearchRequest], *, job: str | None = None, collection: str | None = None
) -> list[list[Hit]]:
    """Return what each query finds in one job, or in one version of a collection; the model is loaded once for all.

    Raises:
        UnknownModel: the model is no longer in the catalogue as it was.
        UserError: the job's vectors aren't in Postgres.
    """
    with place.engine.begin() as connection:
        target: Searchable
        if collection is not None:
            target = collection_to_search(connection, place.workspace_id, collection, wishes[0].version)
        else:
            target = job_to_search(connection, status.find_job(connection, place.workspace_id, str(job)))
    texts = [wish.query for wish in wishes]
    vectors = oneshot(["queries"], {"model": portable(as_model(target.model)), "texts": texts})
    with place.engine.begin() as connection:
        # Vectors may be shortened to fewer dimensions. The shortened query isn't normalised again, since cosine ignores
        # its length.
        return [
            target.nearest(connection, vector[: target.dimensions], wish)
            for wish, vector in zip(wishes, vectors, strict=True)
        ]


def hit_table(hits: list[Hit]) -> Table:
    """Return search results as a table, a line each."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    table.add_column("similarity", justify="right")
    table.add_column("key")
    table.add_column("text" if hits and hits[0].index is not None else "")
    width = max(20, output.stdout.width - _KEY_WIDTH - 20)
    for hit in hits:
        passage = "" if hit.passage is None else f", passage {hit.passage}"
        key, line = Text((hit.key or f"#{hit.index}") + passage), Text(" ".join(_shown(hit).split()))
        key.truncate(_KEY_WIDTH, overflow="ellipsis")
        line.truncate(width, overflow="ellipsis")
        table.add_row(f"{hit.similarity:.3f}", key, line)
    return table


def _shown(hit: Hit) -> str:
    """Return a hit's text, or, in a collection, which keeps none, the columns that it carries."""
    if hit.index is not None:
        return hit.text or "(its text is not in Postgres)"
    return "  ".join(f"{name}={value}" for name, value in (hit.carried or {}).items())
