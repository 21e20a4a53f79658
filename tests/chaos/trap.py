"""What strikes a call once, at a moment that a line sees, in the thread that passes the call on."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.lines import Call


@dataclass
class Trap:
    """What it raises is raised where somebody waits for it."""

    do: Callable[[Call], None]
    _sprung: threading.Event = field(default_factory=threading.Event)
    _error: Exception | None = None

    def spring(self, call: Call) -> None:
        """Strike. The call stands still meanwhile."""
        try:
            self.do(call)
        except Exception as error:  # noqa: BLE001 - the call goes on, whatever came of it
            self._error = error
        self._sprung.set()

    def sprung(self, seconds: float) -> bool:
        """Wait until it has struck. False: it hasn't."""
        sprung = self._sprung.wait(seconds)
        if self._error:
            raise self._error
        return sprung
