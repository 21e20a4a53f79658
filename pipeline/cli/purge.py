"""`vectormill purge`: forget ended jobs."""

import sys
from typing import Annotated, Any

import typer

from pipeline.catalog import DEFAULT_WORKSPACE
from pipeline.cli.connect import Place, working
from pipeline.cli.jobs import Json, Workspace
from pipeline.cli.look import print_json, stderr
from pipeline.errors import UserError
from pipeline.purge import check_ended, months_before, parse_month, purge_job, purge_month
from pipeline.status import find_job, job_row


def purge(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Its id, the beginning of it, or its name.")] = None,
    before: Annotated[
        str | None, typer.Option(metavar="YYYY-MM", help="All jobs of the months before, of every workspace.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Forget a job that has ended, with its items, vectors and rejects; or all jobs of whole months, by dropping their
    partitions. Usage rows stay, since they are the bill; Parquet files stay, since they are yours.

    Examples:

        vectormill purge docs

        vectormill purge --before 2026-09 --dry-run
    """
    if (job is None) == (before is None):
        raise UserError("say what to purge: a job, or --before YYYY-MM.")
    with working(workspace) as place:
        if job is not None:
            gone = _purge_job(place, job, dry_run=dry_run, yes=yes)
        else:
            gone = _purge_months(place, str(before), dry_run=dry_run, yes=yes)
    if as_json:
        print_json(gone)


def _purge_job(place: Place, job: str, *, dry_run: bool, yes: bool) -> dict[str, Any]:
    with place.engine.begin() as connection:
        found = find_job(connection, place.workspace_id, job)
        check_ended(connection, found)
        row = job_row(connection, found)
    what = f"job {found} ({row['name']}, {row['items_total']:,} items)"
    if _agreed(f"Forget {what}?", dry_run=dry_run, yes=yes):
        purge_job(place.engine, found)
        stderr.print(f"Forgotten: {what}.", markup=False)
    else:
        stderr.print(f"Would go: {what}.", markup=False)
    return {"jobs": 1, "months": [], "skipped": [], "dry_run": dry_run}


def _purge_months(place: Place, before: str, *, dry_run: bool, yes: bool) -> dict[str, Any]:
    month = parse_month(before)
    if month is None:
        raise UserError(f'--before "{before}": write the month as 2026-11.')
    with place.engine.begin() as connection:
        months = months_before(connection, month)
    going = [each for each in months if not each.unended]
    for each in months:
        if each.unended:
            stderr.print(f"{each.name} stays: {each.unended:,} of its jobs haven't ended.")
    count = sum(each.jobs for each in going)
    what = f"{count:,} jobs of {len(going)} months" + (f", {going[0].name} to {going[-1].name}" if going else "")
    if going and _agreed(f"Forget {what}?", dry_run=dry_run, yes=yes):
        for each in going:
            purge_month(place.engine, each)
        stderr.print(f"Forgotten: {what}.")
    else:
        stderr.print(f"Would go: {what}." if going else "Nothing to purge.")
    return {
        "jobs": count,
        "months": [each.name for each in going],
        "skipped": [each.name for each in months if each.unended],
        "dry_run": dry_run,
    }


def _agreed(question: str, *, dry_run: bool, yes: bool) -> bool:
    """Whether to go on; with --dry-run never."""
    if dry_run or yes:
        return not dry_run
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody is there to ask; say --yes.")
    return typer.confirm(question, abort=True)
