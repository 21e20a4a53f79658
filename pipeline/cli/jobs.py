"""Commands on jobs: jobs, status, watch, rejects, receipt, cancel, pause, resume, priority, retry."""

import time
from collections.abc import Callable
from typing import Annotated
from uuid import UUID

import typer
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli import output
from pipeline.cli.backends import Backend, open_backend
from pipeline.cli.options import Json, Timeout, Workspace
from pipeline.cli.output import Column
from pipeline.core import humanize
from pipeline.core.errors import ServiceUnreachable, UnknownJob, WaitTimedOut
from pipeline.core.job_status import JobStatus
from pipeline.core.jobs import JobState, Reason
from pipeline.jobs.status import several

Job = Annotated[str, typer.Argument(metavar="JOB", help="Its id, a unique prefix of it, or its name.")]

_EXIT_CODES = {JobState.COMPLETED: 0, JobState.FAILED: 3, JobState.CANCELLED: 4, JobState.PAUSED: 5}
_OUTCOMES = ("embedded", "reused", "unchanged", "rejected", "cancelled", "removed")
_POLL_SECONDS = 0.5
_PLAIN_PERIOD_SECONDS = 10.0
#: Time for which a watch retries a server that doesn't answer.
_PATIENCE_SECONDS = 60.0


def jobs(
    state: Annotated[
        list[JobState] | None,
        typer.Option(metavar="STATE", help=f"Only jobs in this state: {', '.join(JobState)}; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """List jobs, newest first.

    Examples:

        vectormill jobs

        vectormill jobs --state running --state queued --json
    """
    with open_backend(workspace) as backend:
        rows = backend.jobs(state or (), limit)
    if as_json:
        output.print_json([row.model_dump(mode="json") for row in rows])
        return
    if not rows:
        output.stderr.print("No jobs yet. Make one: vectormill submit docs.jsonl --model all-MiniLM-L6-v2")
        return
    roomy = output.is_roomy()
    output.print_list(
        [
            Column("job"),
            Column("name", flexible=True),
            Column("model", flexible=True, from_width=100),
            Column("state", flexible=True),
            Column("items", right=True),
            Column("done", right=True),
            Column("rejected", right=True),
            Column("rate", right=True, from_width=110),
            Column("age", right=True),
        ],
        [_listed(row, roomy=roomy) for row in rows],
    )


def _listed(row: JobStatus, *, roomy: bool) -> list[str | Text]:
    counts = row.items
    rejected = Text(f"{counts.rejected:,}", "yellow" if counts.rejected else "bright_black")
    state = output.state(row.state, row.reason if roomy else None)
    if row.state is JobState.COMPLETED and counts.rejected:
        state.style = "yellow"  # how many, the column tells
    return [
        output.short(row.id),
        row.name,
        row.model,
        state,
        f"{counts.total:,}",
        f"{counts.over / counts.total:.0%}" if counts.total else "–",
        rejected,
        f"{humanize.short(row.rate.items_per_second)}/s",
        output.age(row.created_at, humanize.about),
    ]


def status(job: Job, as_json: Json = False, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Show a job's state, counts, rates and time left.

    Example: vectormill status docs --json
    """
    with open_backend(workspace) as backend:
        tell_namesakes(backend, job)
        row = backend.status(job)
    if as_json:
        output.print_json(row.model_dump(mode="json"))
    else:
        _print_status(row)


def tell_namesakes(backend: Backend, job: str) -> None:
    """Tell the user if several jobs have the name, of which the command takes the newest."""
    bearers = backend.namesakes(job)
    if len(bearers) > 1:
        output.tell([f"{several(job, bearers)}; this is about the newest."])


def _print_status(row: JobStatus) -> None:
    counts, rate = row.items, row.rate
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_row("job", Text(str(row.id)))
    table.add_row("name", Text(row.name, style="bold"))
    table.add_row("model", row.model)
    table.add_row("state", output.state(row.state, row.reason, counts.rejected))
    if row.message:
        table.add_row("", row.message)
    table.add_row("", ProgressBar(total=max(1, counts.total), completed=counts.over, width=40, complete_style="blue"))
    outcomes = [f"{getattr(counts, name):,} {name}" for name in _OUTCOMES if getattr(counts, name)]
    table.add_row("items", f"{counts.over:,} / {counts.total:,}   " + ", ".join(outcomes))
    if row.passages is not None:
        table.add_row("passages", f"{row.passages:,}")
    table.add_row("tokens", f"{row.tokens.prompt:,}")
    if counts.truncated:
        told = output.truncation(counts.truncated, row.lost_tokens, row.most_truncated)
        table.add_row("truncated", Text(told))  # keys are no markup
    table.add_row("chunks", ", ".join(f"{count:,} {name}" for name, count in row.chunks if count))
    roofline = "" if rate.roofline is None else f"   {rate.roofline:.0%} of the roofline".replace("%", " %")
    speed = f"{humanize.short(rate.items_per_second)} items/s   {humanize.short(rate.tokens_per_second)} tok/s"
    table.add_row("rate", speed + roofline)
    if row.eta_seconds is not None:
        table.add_row("time left", f"about {humanize.duration(row.eta_seconds)}")
    table.add_row("made", output.age(row.created_at))
    for notice in row.notices:
        table.add_row("note", Text(notice))
    if row.labels:
        table.add_row("labels", ", ".join(f"{key}={value}" for key, value in row.labels.items()))
    output.stdout.print(table)


def watch(job: Job, timeout: Timeout = None, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Follow a job until it ends or the system pauses it.

    Exit code: 0 completed, 3 failed, 4 cancelled, 5 paused by the system, 7 timeout.

    Example: vectormill watch docs
    """
    with open_backend(workspace) as backend:
        tell_namesakes(backend, job)
        raise typer.Exit(watch_job(backend, backend.status(job).id, timeout))


def watch_job(backend: Backend, job_id: UUID, timeout_seconds: float | None, *, verify: bool = False) -> int:
    """Follow a job until it ends or the system pauses it, and print its receipt. Return the exit code, which is 1
    if the job completed but its verification fails.

    Raises:
        WaitTimedOut: the job hasn't ended within `timeout_seconds`.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    show = _live_line() if output.stderr.is_terminal else _plain_lines()
    try:
        row = _follow(backend, job_id, deadline, show)
    except KeyboardInterrupt:
        show(None)
        output.stderr.print(f"Job {job_id} goes on. Follow it: vectormill watch {job_id}")
        output.stderr.print(f"Stop it: vectormill cancel {job_id}")
        raise
    finally:
        show(None)
    if row.message and row.state != JobState.COMPLETED:
        output.stderr.print(output.state(row.state, row.reason), row.message)
    if not row.items.total and row.state != JobState.COMPLETED:  # perhaps a request in SQL that never became a job
        return _EXIT_CODES[row.state]
    account = backend.receipt(str(job_id), verify=verify)
    output.stderr.print(output.ledger(account, backend.reject_counts(str(job_id))))
    output.stderr.print(output.verdict(account))
    if row.output and row.state == JobState.COMPLETED:
        output.stderr.print(f"Vectors are in {row.output}: _manifest.json lists the files.", markup=False)
    code = _EXIT_CODES[row.state]
    return 1 if verify and not (code or account.verified) else code


def _follow(
    backend: Backend, job_id: UUID, deadline: float | None, show: Callable[[JobStatus | None], None]
) -> JobStatus:
    answered = time.monotonic()
    while True:
        try:
            row = backend.status(str(job_id))
            answered = time.monotonic()
        except ServiceUnreachable:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
        except UnknownJob:  # the job existed when the watch began
            raise ServiceUnreachable(
                f"job {job_id} is gone: it was purged, or the database has lost its last commits (a failover, a "
                "restore); if nobody purged it, submit the same again."
            ) from None
        else:
            show(row)
            state = row.state
            if state.ended or (state is JobState.PAUSED and row.reason != Reason.BY_USER):
                return row
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimedOut(f"job {job_id} hasn't ended within the --timeout; it goes on: vectormill watch {job_id}")
        time.sleep(_POLL_SECONDS)


def _live_line() -> Callable[[JobStatus | None], None]:
    live = Live(console=output.stderr, auto_refresh=False)
    live.start()

    def show(row: JobStatus | None) -> None:
        if row is None:
            live.stop()
        else:
            live.update(output.progress_line(row), refresh=True)

    return show


def _plain_lines() -> Callable[[JobStatus | None], None]:
    """Return a function that prints a line when the state changes, and every ten seconds: for logs."""
    shown: tuple[str, float] = ("", 0.0)

    def show(row: JobStatus | None) -> None:
        nonlocal shown
        if row is None:
            return
        now = time.monotonic()
        if row.state != shown[0] or now - shown[1] >= _PLAIN_PERIOD_SECONDS:
            shown = (row.state, now)
            output.stderr.print(output.plain_progress(row), markup=False)

    return show


def rejects(
    job: Job,
    limit: Annotated[int | None, typer.Option(min=1, help="The most rejects to list.")] = None,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """List the items that could not be embedded, each with its code and a message.

    Example: vectormill rejects docs --json
    """
    with open_backend(workspace) as backend:
        tell_namesakes(backend, job)
        rows = backend.rejects(job, limit)
    if as_json:
        output.print_json(rows)
        return
    if not rows:
        output.stderr.print("No rejects.")
        return
    output.print_list(
        [
            Column("index", right=True),
            Column("key", flexible=True),
            Column("code"),
            Column("message", flexible=True, folds=True),
        ],
        [[f"{row['index']:,}", str(row["key"] or "–"), row["code"], str(row["message"])] for row in rows],
    )


def receipt(
    job: Job,
    verify: Annotated[bool, typer.Option("--verify", help="Count the rows themselves, one by one.")] = False,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Show a job's receipt: items in = embedded + reused + unchanged + rejected + cancelled.

    Exit code 1 if --verify fails: rows are missing or double, or the counts don't balance or have changed.

    Example: vectormill receipt docs --verify
    """
    with open_backend(workspace) as backend:
        tell_namesakes(backend, job)
        account = backend.receipt(job, verify=verify)
        codes = {} if as_json else backend.reject_counts(job)
    if as_json:
        output.print_json(account.model_dump(mode="json", by_alias=True, exclude_none=True))
    else:
        output.stdout.print(output.ledger(account, codes))
        output.stdout.print(output.verdict(account))
    if verify and not account.verified:
        raise typer.Exit(1)


def _steer(job: str, workspace: str, verb: str) -> tuple[UUID, JobState]:
    with open_backend(workspace) as backend:
        return backend.steer(job, verb)


def cancel(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Cancel a job. Committed vectors stay; the receipt counts the remaining items as cancelled.

    Example: vectormill cancel docs
    """
    found, state = _steer(job, workspace, "cancel")
    output.stderr.print(f"Job {found} is {state}.")


def pause(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Pause a job: running chunks finish, and no others start.

    Example: vectormill pause docs
    """
    found, state = _steer(job, workspace, "pause")
    output.stderr.print(f"Job {found} is {state}; vectormill resume {found} lets it go on.")


def resume(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Resume a paused job.

    Example: vectormill resume docs
    """
    found, state = _steer(job, workspace, "resume")
    output.stderr.print(f"Job {found} is {state}.")


def priority(
    job: Job,
    value: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="Higher goes first; 0 is usual.")],
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Change a job's priority. Running chunks aren't interrupted.

    Example: vectormill priority docs 10
    """
    with open_backend(workspace) as backend:
        found = backend.prioritise(job, value)
    output.stderr.print(f"Job {found} has priority {value}.")


def retry(job: Job, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Retry what may succeed: rejects with a retryable code, and the items that a failed job left undone.

    Example: vectormill retry docs
    """
    with open_backend(workspace) as backend:
        found, reopened = backend.retry(job)
    if reopened:
        output.stderr.print(f"Job {found} is queued again: {reopened:,} chunks to do.")
    else:
        output.stderr.print(f"Job {found} has nothing to retry; see: vectormill rejects {found}")
