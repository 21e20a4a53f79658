"""Terminal output: numbers, states, the progress bar, the receipt's table.

Data goes to standard output, everything else to standard error.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.core import humanize
from pipeline.core.errors import UserError, VectormillError
from pipeline.core.job_status import JobStatus, Receipt, TruncatedItem
from pipeline.core.jobs import JobState

#: Width in columns where the output isn't a terminal.
_PIPE_WIDTH = 140
#: The same of lists, in which nothing is to be lost.
_ANY_WIDTH = 1_000_000
#: Width from which on a terminal has room for more columns, and more space between them.
_ROOMY_WIDTH = 100

#: For messages to people, which stay visible when standard output is a pipe.
stderr = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)
stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)

_STATE_COLOURS = {
    "completed": "green",
    "running": "blue",
    "failed": "red",
    "paused": "yellow",
    "cancelling": "yellow",
    "cancelled": "bright_black",
}
_STATE_MARKS = {"completed": "✓", "failed": "✗", "running": "▸", "paused": "‖", "cancelled": "–", "cancelling": "–"}


def print_json(value: Any) -> None:
    """Print data as JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def tell(notices: Iterable[str]) -> None:
    """Print notices, a line each: what the user should know though nothing is refused."""
    for notice in notices:
        stderr.print(Text("note ", "yellow"), Text(notice), sep="")


#: Flags of the fields whose options have another name.
_FLAGS = {
    "labels": "--label",
    "sources": "SOURCE",
    "expires_in_days": "--expires",
    "overlap_hours": "--overlap",
}


def sentence(error: VectormillError) -> str:
    """Return an error's message for the user of the command line, in which a wrong option is called by its flag."""
    if not isinstance(error, UserError) or error.field is None:
        return str(error)
    name = error.field.partition(".")[0]
    return error.spelled(_FLAGS.get(name, f"--{name.replace('_', '-')}"))


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a list."""

    name: str
    right: bool = False
    #: Shortened where the terminal is narrow; or with `folds`, written on several lines.
    flexible: bool = False
    folds: bool = False
    #: Width of the terminal from which on the column is shown.
    from_width: int = 0


def is_roomy() -> bool:
    """Return True if standard output has room for more than what fits 80 columns."""
    return not stdout.is_terminal or stdout.width >= _ROOMY_WIDTH


def print_list(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a list as a table that fits the terminal; into a pipe nothing is shortened or left out."""
    width = stdout.width if stdout.is_terminal else None
    shown = [at for at, column in enumerate(columns) if width is None or width >= column.from_width]
    table = Table(box=None, padding=(0, 3 if is_roomy() else 2, 0, 0))
    table.header_style = "bright_black"
    for at in shown:
        column = columns[at]
        table.add_column(column.name, justify="right" if column.right else "left", no_wrap=not column.flexible)
    for row in rows:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
        for at in shown:
            if not columns[at].folds:
                cells[at].no_wrap, cells[at].overflow = True, "ellipsis"
        table.add_row(*(cells[at] for at in shown))
    wide = stdout if width else Console(file=stdout.file, highlight=False, width=_ANY_WIDTH)
    wide.print(table, soft_wrap=width is None)


def age(moment: datetime | None, shown: Callable[[float], str] = humanize.duration) -> str:
    """Return the time since a moment, such as “4 min 40 s ago”; “–” if there is none."""
    if moment is None:
        return "–"
    return shown(max(timedelta(0), datetime.now(moment.tzinfo) - moment).total_seconds()) + " ago"


def state(name: str, reason: str | None = None, rejected: int = 0) -> Text:
    """Return a state with its mark, its colour, its reason, and how many items of a completed job were rejected."""
    if name == JobState.COMPLETED and rejected:
        return Text(f"✓ completed, {rejected:,} rejected", style="yellow")
    shown = f"{_STATE_MARKS.get(name, '·')} {name}" + (f" ({reason})" if reason else "")
    return Text(shown, style=_STATE_COLOURS.get(name, ""))


def progress_line(status: JobStatus) -> Table:
    """Return the progress line of a running job: name, model, bar, share, items, rates, time left."""
    items, rate = status.items, status.rate
    share = items.over / items.total if items.total else 0.0
    roomy = stderr.width >= _ROOMY_WIDTH
    model = [Text(status.model, style="bright_black", overflow="ellipsis", no_wrap=True)] if roomy else []
    tokens = [Text(f"{humanize.short(rate.tokens_per_second)} tok/s", no_wrap=True)] if roomy else []
    line = Table.grid(padding=(0, 2))
    cells: list[Any] = [
        Text(status.name, style="bold", overflow="ellipsis", no_wrap=True),
        *model,
        ProgressBar(
            total=1.0, completed=share, width=24 if roomy else 8, complete_style="blue", finished_style="green"
        ),
        Text(f"{share:4.0%}".replace("%", " %"), no_wrap=True),
        Text(f"{items.over:,} / {items.total:,}", no_wrap=True),
        Text(f"{humanize.short(rate.items_per_second)} items/s", no_wrap=True),
        *tokens,
        _time_left(status),
    ]
    # Only names are shortened: the time left is what people look for.
    for cell in cells:
        shortened = isinstance(cell, Text) and cell.overflow == "ellipsis"
        line.add_column(no_wrap=not shortened)
    line.add_row(*cells)
    return line


def _time_left(status: JobStatus) -> Text:
    if status.state != "running":
        return state(status.state, status.reason, status.items.rejected)
    if status.items.total and not status.items.pending:
        return Text("finishing", style="bright_black", no_wrap=True)
    if status.eta_seconds is None:
        return Text("time left: not yet", style="bright_black", no_wrap=True)
    return Text(f"{humanize.duration(status.eta_seconds)} left", no_wrap=True)


def plain_progress(status: JobStatus) -> str:
    """Return the progress line for a log: plain text, without colours or a bar."""
    items, rate = status.items, status.rate
    left = "" if status.eta_seconds is None else f"  {humanize.duration(status.eta_seconds)} left"
    if status.state == "running" and items.total and not items.pending:
        left = "  finishing"
    return (
        f"{status.name}  {status.state}  {items.over:,} / {items.total:,}  "
        f"{humanize.short(rate.items_per_second)} items/s  {humanize.short(rate.tokens_per_second)} tok/s{left}"
    )


def ledger(receipt: Receipt, codes: Mapping[str, int]) -> RenderableType:
    """Return a receipt as a table of items and tokens; `codes` has the number of rejects by code."""
    items, tokens = receipt.items, receipt.tokens
    table = Table(box=None, padding=(0, 3, 0, 0), show_edge=False, header_style="bright_black")
    table.add_column("")
    table.add_column("items", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_row("in", f"{items.submitted:,}", "")
    table.add_row("embedded", f"{items.embedded:,}", f"{tokens.prompt:,}")
    for part in receipt.embedded_on:
        where = f"  on {part.device}, {part.precision}"
        table.add_row(where, f"{part.items:,}", f"{part.tokens:,}", style="bright_black")
    if receipt.passages is not None:
        table.add_row("passages", f"{receipt.passages:,}", "")
    if receipt.truncated:
        lost = f"about {receipt.lost_tokens:,} lost" if receipt.lost_tokens else ""
        table.add_row("truncated", f"{receipt.truncated:,}", lost)
    table.add_row("reused", f"{items.reused:,}", f"{tokens.reused:,} saved" if tokens.reused else "")
    if items.unchanged:
        unchanged = tokens.saved - tokens.reused
        table.add_row("unchanged", f"{items.unchanged:,}", f"{unchanged:,} saved" if unchanged else "")
    table.add_row("rejected", f"{items.rejected:,}", "")
    table.add_row("cancelled", f"{items.cancelled:,}", "")
    if items.removed:
        table.add_row("removed", f"{items.removed:,}", "")
    if unanswered := tokens.unanswered:
        table.add_row("unanswered", "", f"about {unanswered:,}")
    if unanswered or tokens.billed != tokens.prompt:
        table.add_row("billed", "", f"{tokens.billed:,}")
    why = ", ".join(f"{count:,} {code}" for code, count in codes.items())
    hint = [Text(f"{why}: vectormill rejects {short(receipt.id)}", style="yellow")] if why else []
    if receipt.truncated:
        told = truncation(receipt.truncated, receipt.lost_tokens, receipt.most_truncated)
        # An upstream cuts texts by its own limit.
        ours = receipt.embedded_on or not items.embedded
        advice = _AGAINST_TRUNCATION if ours else "A model with a higher limit reads more of them."
        hint.append(Text(f"{told}. {advice}", style="yellow"))
    return Group(Text.assemble(("receipt  ", "bright_black"), str(receipt.id)), table, *hint)


_AGAINST_TRUNCATION = (
    "--on-long split makes passages of such texts, --on-long reject rejects them; a greater --max-item-tokens or "
    "another model reads more of them. Results mark them (truncated)."
)


def truncation(texts: int, lost_tokens: int, most: Sequence[TruncatedItem]) -> str:
    """Return how many texts were truncated, and which lost the most tokens."""
    told = ("1 text was" if texts == 1 else f"{texts:,} texts were") + " truncated at the token limit"
    if lost_tokens:
        keys = ", ".join(f"{each.key or f'#{each.index}'} ({each.lost_tokens:,})" for each in most)
        told += f"; about {lost_tokens:,} tokens weren't read, most of {keys}"
    return told


def short(job_id: UUID) -> str:
    """Return the beginning of a job's id, enough to tell it from others: its time to the millisecond."""
    return str(job_id)[:13]


def verdict(receipt: Receipt) -> Text:
    """Return the last line below a receipt: balanced or not, and the verification's result."""
    if not receipt.balanced:
        open_items = receipt.items.submitted - receipt.items.settled
        return Text(f"not balanced yet: {open_items:,} items are still to do", style="yellow")
    if receipt.verified is None:
        return Text("balanced; --verify counts the rows", style="green")
    counts = f"{receipt.missing:,} missing, {receipt.double:,} double"
    if receipt.verified:
        return Text(f"balanced, verified: {counts}", style="green")
    return Text(f"NOT VERIFIED: {counts}", style="bold red")
