"""Command `vectormill restore-check`: checks and repairs of a restored database."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pipeline.cli.context import working
from pipeline.cli.options import Json
from pipeline.cli.output import print_json, stderr, stdout

if TYPE_CHECKING:
    from pipeline.jobs.restore import Matter


def restore_check(
    mend: Annotated[bool, typer.Option("--mend", help="Repair what can be repaired here, and report it.")] = False,
    as_json: Json = False,
) -> None:
    """Check a database that was restored, or failed over to a standby without its last commits: sequences, stale
    claims, missing Parquet parts and uploaded files, jobs that go on, and keys that may be live again.

    Exit code: 0 if nothing is left that --mend can repair, else 1. Safe to run at any time, and to repeat.

    Examples:

        vectormill restore-check

        vectormill restore-check --mend
    """
    from pipeline.jobs.restore import check

    told: list[dict[str, str | bool]] = []
    with working() as place:
        for matter in check(place.engine):
            done = matter.mend() if mend and matter.mend else ""
            needed = matter.mend is not None and not done
            told.append(
                {"check": matter.name, "found": matter.found, "advice": matter.advice, "mend": needed, "done": done}
            )
            if not as_json:
                stdout.print(_line(matter, done, needed=needed))
    if as_json:
        print_json(told)
    if any(line["mend"] for line in told):
        stderr.print("Stop dispatchers and workers if you can, then: vectormill restore-check --mend")
        raise typer.Exit(1)


def _line(matter: "Matter", done: str, *, needed: bool) -> Text:
    mark, colour = ("✗", "red") if needed else ("!", "yellow") if matter.advice else ("✓", "green")
    more = f": {done}" if done else f". {matter.advice}" if matter.advice else ""
    return Text.assemble((f"{mark} ", colour), f"{matter.name:<10}{matter.found}{more}")
