"""Command `vectormill results`: export of a job's vectors."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli import output
from pipeline.cli.backends import open_backend
from pipeline.cli.jobs import Job, tell_namesakes
from pipeline.cli.options import Workspace


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
