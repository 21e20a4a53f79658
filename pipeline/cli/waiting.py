"""Progress line of a start or a stop: the names it waits for, and the seconds so far."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

_LINE_SECONDS = 15.0


class Waiting:
    """Progress line with names and seconds: updated in place on a terminal, elsewhere printed every 15 seconds.

    Args:
        verb: the activity, such as `Starting`.
    """

    def __init__(self, console: Console, verb: str) -> None:
        self._console = console
        self.verb = verb
        self._names: Sequence[str] = ()
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._status = Status("", console=console) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status:
            self._status.update(self)
            self._status.start()
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def show(self, names: Sequence[str]) -> None:
        """Show these names from now on, and say which others aren't waited for any more."""
        for name in self._names:
            if name not in names:
                self._console.print(f"  {name}  {self.seconds:,.0f} s", markup=False)
        self._names = tuple(names)

    def end(self) -> None:
        """End the line. Idempotent."""
        self._ended.set()
        if self._status:
            self._status.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start or the stop began."""
        return time.monotonic() - self._began

    def __rich__(self) -> str:
        waited_for = f"  waiting for {', '.join(self._names)}" if self._names else ""
        return f"{self.verb}  {self.seconds:,.0f} s{waited_for}"

    def _print_lines(self) -> None:
        while not self._ended.wait(_LINE_SECONDS):
            self._console.print(self.__rich__(), markup=False)
