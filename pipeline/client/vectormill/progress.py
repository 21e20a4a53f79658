"""Progress of a job that is waited for: a bar in a terminal or a notebook."""

import sys
from contextlib import ExitStack
from typing import Any

from .records import JobStatus


class Progress:
    """Bar with rate and time left. `shown=None`: only in a terminal, or in a notebook."""

    def __init__(self, shown: bool | None) -> None:
        self._shown, self._opened = shown, ExitStack()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._shown is not False and _in_notebook():
            self._bar = _NotebookBar()
        elif self._shown or (self._shown is None and sys.stderr.isatty()):
            self._bar = self._opened.enter_context(_TerminalBar())
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()

    def show(self, status: JobStatus) -> None:
        """Show how far the job is."""
        if self._bar:
            self._bar.show(status)


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell else None
    return found is not None and hasattr(found, "kernel")


def _told(status: JobStatus) -> str:
    """Return what stands beside the bar."""
    items = status.items
    told = f"{items.total - items.pending:,} / {items.total:,}"
    if status.ended or status.state == "paused":
        told += f"  {status.state}" + (f", {items.rejected:,} rejected" if items.rejected else "")
    elif status.items_per_second:
        told += f"  {status.items_per_second:,.0f} items/s"
        if status.eta_seconds is not None:
            told += f"  {_duration(status.eta_seconds)} left"
    return told


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _TerminalBar:
    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[told]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=None, told="")

    def __enter__(self) -> "_TerminalBar":
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def show(self, status: JobStatus) -> None:
        total = status.items.total
        self._progress.update(
            self._task,
            description=status.name,
            total=total or None,
            completed=total - status.items.pending,
            told=_told(status),
        )


class _NotebookBar:
    def __init__(self) -> None:
        self._shown: Any = None

    def show(self, status: JobStatus) -> None:
        from html import escape

        from IPython.display import HTML, display

        items = status.items
        share = (items.total - items.pending) / items.total if items.total else 0.0
        bar = HTML(
            f"<div style='font-family: sans-serif'>{escape(status.name)} "
            f"<progress value='{share:.4f}' max='1' style='width: 20em; vertical-align: middle'></progress> "
            f"{escape(_told(status))}</div>"
        )
        if self._shown is None:
            self._shown = display(bar, display_id=True)
        else:
            self._shown.update(bar)
