"""Trap that strikes a call once, at a moment that a line detects, in the thread that passes the call on."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.lines import Call


@dataclass
class Trap:
    """Action on one call. Its exception is raised where `sprung` is awaited."""

    do: Callable[[Call], None]
    _sprung: threading.Event = field(default_factory=threading.Event)
    _error: Exception | None = None

    def spring(self, call: Call) -> None:
        """Strike, while the call stands still."""
        try:
            self.do(call)
        except Exception as error:  # noqa: BLE001 - the call goes on, whatever came of it
            self._error = error
        self._sprung.set()

    def sprung(self, seconds: float) -> bool:
        """Wait until the trap has struck. Return False if it hasn't in time."""
        sprung = self._sprung.wait(seconds)
        if self._error:
            raise self._error
        return sprung
