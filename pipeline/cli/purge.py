"""Command `vectormill purge`: deletion of ended jobs."""

import sys
from typing import Annotated, Any

import typer
from sqlalchemy import Engine

from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli.context import CommandContext, working
from pipeline.cli.options import Json, Workspace
from pipeline.cli.output import print_json, stderr
from pipeline.core.errors import UserError
from pipeline.core.job_status import JobStatus
from pipeline.jobs.purge import check_ended, months_before, parse_month, purge_job, purge_month
from pipeline.jobs.status import find_job_to_change, sum_up


def purge(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Its id, a unique prefix of it, or its name.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="YYYY-MM", help="All jobs of earlier months, in every workspace.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Delete an ended job with its items, vectors and rejects, or drop whole months of jobs with their partitions.

    Usage rows stay, since they are the bill. Parquet files and your own tables stay, since they are yours.

    Examples:

        vectormill purge docs

        vectormill purge --before 2026-09 --dry-run
    """
    if (job is None) == (before is None):
        raise UserError("give what to purge: a job, or --before YYYY-MM.")
    with working(workspace) as place:
        if job is not None:
            gone = _purge_job(place, job, dry_run=dry_run, yes=yes)
        else:
            gone = _purge_months(place.engine, str(before), dry_run=dry_run, yes=yes)
    if as_json:
        print_json({"dry_run": dry_run, **gone})


def _purge_job(place: CommandContext, job: str, *, dry_run: bool, yes: bool) -> dict[str, Any]:
    with place.engine.begin() as connection:
        found = find_job_to_change(connection, place.workspace_id, job, ended=True)
        check_ended(connection, found)
        now = sum_up(connection, found)
    what = f"job {found} ({now.name}, {now.items.total:,} items)"
    if not _agreed(f"Delete {what}?", dry_run=dry_run, yes=yes):
        stderr.print(f"Would delete: {what}.", markup=False)
        return {"jobs": 1, **_rows_of(now)}
    gone = purge_job(place.engine, found)
    stderr.print(f"Deleted: {what}. Its usage rows stay.", markup=False)
    return {"jobs": 1, **gone}


def _rows_of(status: JobStatus) -> dict[str, int]:
    """Return the number of a job's rows by table, from its chunks' counts."""
    counts, vectors = status.items, status.items.embedded + status.items.reused
    return {
        "items": counts.total,
        "embeddings": vectors if status.passages is None else 0,
        "passages": status.passages or 0,
        "rejects": counts.rejected,
        "chunks": status.chunks.total,
    }


def _purge_months(engine: Engine, before: str, *, dry_run: bool, yes: bool) -> dict[str, Any]:
    month = parse_month(before)
    if month is None:
        raise UserError(f'--before "{before}": write the month as 2026-11.')
    with engine.begin() as connection:
        months = months_before(connection, month)
    skipped = {each.name: each.why_it_stays for each in months if each.why_it_stays}
    going = [each for each in months if each.name not in skipped]
    what = f"{sum(each.jobs for each in going):,} jobs of {', '.join(each.name for each in going)}"
    if going and _agreed(f"Delete {what}?", dry_run=dry_run, yes=yes):
        skipped |= {each.name: why for each in going if (why := purge_month(engine, each.first))}
        going = [each for each in going if each.name not in skipped]
        stderr.print(f"Deleted: {sum(each.jobs for each in going):,} jobs of {len(going)} months; usage rows stay.")
    else:
        stderr.print(f"Would delete: {what}." if going else "Nothing to purge.")
    for name, why in skipped.items():
        stderr.print(f"{name} stays: {why}.")
    gone = {"jobs": sum(each.jobs for each in going), "months": [each.name for each in going]}
    return {**gone, "skipped": skipped}


def _agreed(question: str, *, dry_run: bool, yes: bool) -> bool:
    """Return True if the user agrees, or --yes does; always False with --dry-run."""
    if dry_run or yes:
        return not dry_run
    if not sys.stdin.isatty():
        raise UserError(f"{question} There is no terminal to ask; confirm it with --yes.")
    return typer.confirm(question, abort=True, err=True)
