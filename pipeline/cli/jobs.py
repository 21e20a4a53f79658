"""Commands on a job: jobs, status, watch, rejects, receipt, cancel, pause, resume, retry."""

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from pipeline import control
from pipeline import status as reading
from pipeline.catalog import DEFAULT_WORKSPACE
from pipeline.cli import look
from pipeline.cli.connect import Place, working
from pipeline.errors import WaitTimedOut
from pipeline.jobs import JobState, Reason
from pipeline.store import items
from pipeline.store import jobs as job_rows
from pipeline.store.database import is_connection_lost

Job = Annotated[str, typer.Argument(metavar="JOB", help="Its id, the beginning of it, or its name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Stop waiting after so long; exit 7.")]
Workspace = Annotated[str, typer.Option(help="The workspace.")]

_EXIT_CODES = {JobState.COMPLETED: 0, JobState.FAILED: 3, JobState.CANCELLED: 4, JobState.PAUSED: 5}
_POLL_SECONDS = 0.5
_PLAIN_PERIOD_SECONDS = 10.0
#: How long a watch bears with a database that is away.
_PATIENCE_SECONDS = 60.0
_PAGE = 1_000


def jobs(
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """List jobs, newest first.

    Examples:

        vectormill jobs

        vectormill jobs --state running --state queued --json
    """
    with working(workspace) as place, place.engine.begin() as connection:
        found = job_rows.newest(connection, place.workspace_id, limit, state or ())
        rows = [reading.job_status(connection, job) for job in found]
    if as_json:
        look.print_json(rows)
        return
    if not rows:
        look.stderr.print("No jobs yet. Make one: vectormill submit docs.jsonl --model all-MiniLM-L6-v2")
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    for name in ("job", "name", "model", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("items", "done", "rate", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        counts = row["items"]
        over = counts["total"] - counts["pending"]
        table.add_row(
            look.short(row["id"]),
            row["name"],
            row["model"],
            look.state(row["state"], row["reason"]),
            f"{counts['total']:,}",
            f"{over / counts['total']:.0%}" if counts["total"] else "–",
            f"{look.number(row['rate']['items_per_second'])}/s",
            look.age(row["created_at"]),
        )
    look.stdout.print(table)


def status(job: Job, as_json: Json = False, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Show where a job stands.

    Example: vectormill status docs --json
    """
    with working(workspace) as place, place.engine.begin() as connection:
        found = reading.find_job(connection, place.workspace_id, job)
        row = reading.job_status(connection, found)
    if as_json:
        look.print_json(row)
    else:
        _print_status(row)


def _print_status(row: Mapping[str, Any]) -> None:
    counts, rate, chunks = row["items"], row["rate"], row["chunks"]
    over = counts["total"] - counts["pending"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_row("job", Text(row["id"]))
    table.add_row("name", Text(row["name"], style="bold"))
    table.add_row("model", row["model"])
    table.add_row("state", look.state(row["state"], row["reason"]))
    if row["message"]:
        table.add_row("", row["message"])
    table.add_row("", ProgressBar(total=max(1, counts["total"]), completed=over, width=40, complete_style="blue"))
    outcomes = [f"{counts[name]:,} {name}" for name in ("embedded", "reused", "rejected", "cancelled") if counts[name]]
    table.add_row("items", f"{over:,} / {counts['total']:,}   " + ", ".join(outcomes))
    table.add_row("tokens", f"{row['tokens']['prompt']:,}   {counts['truncated']:,} texts truncated")
    table.add_row("chunks", ", ".join(f"{count:,} {name}" for name, count in chunks.items() if count))
    table.add_row(
        "rate", f"{look.number(rate['items_per_second'])} items/s   {look.number(rate['tokens_per_second'])} tok/s"
    )
    if row["eta_seconds"] is not None:
        table.add_row("time left", f"about {look.duration(row['eta_seconds'])}")
    table.add_row("made", look.age(row["created_at"]))
    if row["labels"]:
        table.add_row("labels", ", ".join(f"{key}={value}" for key, value in row["labels"].items()))
    look.stdout.print(table)


def watch(job: Job, timeout: Timeout = None, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Follow a job to its end. Exit code: 0 completed, 3 failed, 4 cancelled, 5 paused by the system, 7 time-out.

    Example: vectormill watch docs
    """
    with working(workspace) as place:
        with place.engine.begin() as connection:
            found = reading.find_job(connection, place.workspace_id, job)
        raise typer.Exit(watch_job(place, str(found), timeout))


def watch_job(place: Place, job_id: str, timeout_seconds: float | None, *, verify: bool = False) -> int:
    """Follow a job until it ends or the system pauses it, and print its receipt. Returns the exit code; 1 if
    `verify` and the rows object.

    Raises:
        WaitTimedOut: it didn't within `timeout_seconds`.
    """
    job = UUID(job_id)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    show = _live_line() if look.stderr.is_terminal else _plain_lines()
    try:
        row = _follow(place, job, deadline, show)
    finally:
        show(None)
    if row["message"] and row["state"] != JobState.COMPLETED:
        look.stderr.print(look.state(row["state"], row["reason"]), row["message"])
    with place.engine.begin() as connection:
        account = reading.receipt(connection, job, verify=verify)
        codes = items.count_rejects(connection, job)
        folder = reading.job_row(connection, job)["options"].get("output")
    look.stderr.print(look.ledger(account, codes))
    look.stderr.print(look.verdict(account))
    if folder and row["state"] == JobState.COMPLETED:
        look.stderr.print(f"Vectors are in {folder}: _manifest.json lists the files.", markup=False)
    code = _EXIT_CODES[JobState(row["state"])]
    return 1 if verify and not (code or account["verified"]) else code


def _follow(
    place: Place, job: UUID, deadline: float | None, show: Callable[[Mapping[str, Any] | None], None]
) -> dict[str, Any]:
    answered = time.monotonic()
    while True:
        try:
            with place.engine.begin() as connection:
                row = reading.job_status(connection, job)
            answered = time.monotonic()
        except DBAPIError as error:
            if not is_connection_lost(error) or time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
        else:
            show(row)
            state = JobState(row["state"])
            if state.ended or (state is JobState.PAUSED and row["reason"] != Reason.BY_USER):
                return row
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimedOut(f"job {job} hasn't ended within the --timeout; it goes on: vectormill watch {job}")
        time.sleep(_POLL_SECONDS)


def _live_line() -> Callable[[Mapping[str, Any] | None], None]:
    live = Live(console=look.stderr, auto_refresh=False)
    live.start()

    def show(row: Mapping[str, Any] | None) -> None:
        if row is None:
            live.stop()
        else:
            live.update(look.progress_line(row), refresh=True)

    return show


def _plain_lines() -> Callable[[Mapping[str, Any] | None], None]:
    """A line when the state changes and every ten seconds: for logs."""
    shown: tuple[str, float] = ("", 0.0)

    def show(row: Mapping[str, Any] | None) -> None:
        nonlocal shown
        if row is None:
            return
        now = time.monotonic()
        if row["state"] != shown[0] or now - shown[1] >= _PLAIN_PERIOD_SECONDS:
            shown = (row["state"], now)
            look.stderr.print(look.plain_progress(row), markup=False)

    return show


def rejects(
    job: Job,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """List the items that could not be embedded, each with its code and why.

    Example: vectormill rejects docs --json
    """
    with working(workspace) as place, place.engine.begin() as connection:
        found = reading.find_job(connection, place.workspace_id, job)
        rows = _all_rejects(connection, found, limit)
    if as_json:
        look.print_json(rows)
        return
    if not rows:
        look.stderr.print("No rejects.")
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    table.add_column("index", justify="right")
    for name in ("key", "code", "message"):
        table.add_column(name)
    for row in rows:
        table.add_row(f"{row['index']:,}", Text(str(row["key"] or "–")), row["code"], Text(str(row["message"])))
    look.stdout.print(table)


def _all_rejects(connection: Connection, job: UUID, limit: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while limit is None or len(rows) < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - len(rows))
        page = items.list_rejects(connection, job, rows[-1]["index"] if rows else -1, size)
        rows += page
        if len(page) < size:
            break
    return rows


def receipt(
    job: Job,
    verify: Annotated[bool, typer.Option("--verify", help="Count the rows themselves, one by one.")] = False,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Show a job's account: items in = embedded + reused + rejected + cancelled. Exit code 1 if --verify objects.

    Example: vectormill receipt docs --verify
    """
    with working(workspace) as place, place.engine.begin() as connection:
        found = reading.find_job(connection, place.workspace_id, job)
        account = reading.receipt(connection, found, verify=verify)
        codes = items.count_rejects(connection, found)
    if as_json:
        look.print_json(account)
    else:
        look.stdout.print(look.ledger(account, codes))
        look.stdout.print(look.verdict(account))
    if verify and not account["verified"]:
        raise typer.Exit(1)


def _control(job: str, workspace: str, act: Callable[[Connection, UUID], Any]) -> tuple[UUID, Any]:
    with working(workspace) as place, place.engine.begin() as connection:
        found = reading.find_job(connection, place.workspace_id, job)
        return found, act(connection, found)


def cancel(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Cancel a job. Vectors that are committed stay, and the receipt counts the rest as cancelled.

    Example: vectormill cancel docs
    """
    found, state = _control(job, workspace, control.cancel)
    look.stderr.print(f"Job {found} is {state}.")


def pause(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Pause a job: chunks that run end, no other starts.

    Example: vectormill pause docs
    """
    found, state = _control(job, workspace, control.pause)
    look.stderr.print(f"Job {found} is {state}; vectormill resume {found} lets it go on.")


def resume(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Let a paused job go on.

    Example: vectormill resume docs
    """
    found, state = _control(job, workspace, control.resume)
    look.stderr.print(f"Job {found} is {state}.")


def priority(
    job: Job,
    value: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="Higher goes first; 0 is usual.")],
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Change a job's priority; chunks that run go on.

    Example: vectormill priority docs 10
    """
    found, _ = _control(job, workspace, lambda connection, job_id: control.prioritise(connection, job_id, value))
    look.stderr.print(f"Job {found} has priority {value}.")


def retry(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Try again what may succeed: rejects with a code that can be retried, and what a failed job left undone.

    Example: vectormill retry docs
    """
    found, reopened = _control(job, workspace, control.retry)
    if reopened:
        look.stderr.print(f"Job {found} is queued again: {reopened:,} chunks to do.")
    else:
        look.stderr.print(f"Job {found} has nothing that can be tried again; vectormill rejects {found} says why.")
