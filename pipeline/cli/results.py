"""Commands `vectormill results` and `vectormill search`: export of a job's vectors, and search in them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pipeline.catalog.models import DEFAULT_WORKSPACE, as_model, portable
from pipeline.cli import output
from pipeline.cli.backends import open_backend
from pipeline.cli.context import CommandContext, working
from pipeline.cli.database_backend import DatabaseBackend
from pipeline.cli.jobs import Job, Json, Workspace, tell_namesakes
from pipeline.cli.oneshot import oneshot
from pipeline.core.errors import UnknownModel, UserError
from pipeline.core.options import PASSAGE_COLUMNS
from pipeline.db import embeddings, jobs, models
from pipeline.db.embeddings import Found
from pipeline.jobs import status as reading

_KEY_WIDTH = 40


def results(
    job: Job,
    to: Annotated[Path, typer.Option(metavar="FILE", help="A .parquet or .jsonl file.")],
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Write a job's vectors to a file, in index order: index, key, embedding, tokens, truncated, of passages also
    passage, start and stop, and carried columns.

    Example: vectormill results docs --to vectors.parquet
    """
    with open_backend(workspace) as backend:
        tell_namesakes(backend, job)
        written = backend.results(job, to)
    output.stderr.print(written, markup=False)


def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.")],
    job: Annotated[str, typer.Option(help="The job to search in: id, unique prefix of it, or name.")],
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many results.")] = 5,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Find the items of a job nearest to a query, by exact cosine similarity.

    Example: vectormill search "read a file line by line" --job docs
    """
    with working(workspace) as place:
        tell_namesakes(DatabaseBackend(place), job)
        hits = search_many(place, job, [query], limit)[0]
    if as_json:
        output.print_json(hits)
    else:
        output.stdout.print(hit_table(hits))


def search_many(place: CommandContext, job: str, queries: list[str], limit: int) -> list[list[dict[str, Any]]]:
    """Return the items or passages nearest to each query: `{index, key, similarity, text}`, and of passages also
    `{passage, start, stop}`.

    Raises:
        UnknownModel: the job's model is no longer in the catalogue as it was.
        UserError: the job's vectors aren't in Postgres.
    """
    with place.engine.begin() as connection:
        found = reading.find_job(connection, place.workspace_id, job)
        model = models.of_job(connection, found)
        options = reading.known_job(connection, found).options
        dimensions = jobs.vector_space(connection, found)["dimensions"]
    if options.output:
        raise UserError(
            f"the vectors of job {found} are Parquet files at {options.output}; query them there, with DuckDB say."
        )
    if model is None:
        raise UnknownModel(
            f"the model of job {found} is no longer in the catalogue as it was; a query can't be embedded."
        )
    vectors = oneshot(["queries"], {"model": portable(as_model(model)), "texts": queries})
    with place.engine.begin() as connection:
        # A job's vectors may be shortened to fewer dimensions. The shortened query isn't normalised again, since
        # cosine ignores its length.
        hits = [
            embeddings.nearest(connection, found, vector[:dimensions], limit, passages=options.splits)
            for vector in vectors
        ]
    return [[_shown(hit) for hit in some] for some in hits]


def _shown(hit: Found) -> dict[str, Any]:
    shown = hit._asdict() | {"similarity": round(hit.similarity, 4)}
    if hit.start is None:
        for name in PASSAGE_COLUMNS:
            del shown[name]
    return shown


def hit_table(hits: list[dict[str, Any]]) -> Table:
    """Return search results as a table, a line each."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    table.add_column("similarity", justify="right")
    table.add_column("key")
    table.add_column("text")
    width = max(20, output.stdout.width - _KEY_WIDTH - 20)
    for hit in hits:
        key, line = (
            Text((hit["key"] or f"#{hit['index']}") + (f", passage {hit['passage']}" if "passage" in hit else "")),
            Text(" ".join((hit["text"] or "(its text is not in Postgres)").split())),
        )
        key.truncate(_KEY_WIDTH, overflow="ellipsis")
        line.truncate(width, overflow="ellipsis")
        table.add_row(f"{hit['similarity']:.3f}", key, line)
    return table
