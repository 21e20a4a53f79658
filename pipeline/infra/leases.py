"""A lease kept alive by a thread while its holder works."""

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Self

import structlog

log = structlog.get_logger()


class Renewal:
    """Calls `renew` every third of a lease, from entering to leaving the `with` block.

    `renew` returns whether the lease still holds. A call that raises (the database is away) is tried again at the next
    turn: whether the lease outlived the gap is for the database to say. When it doesn't hold any more, `on_lost` is
    called.
    """

    def __init__(
        self, renew: Callable[[], bool], lease_seconds: float, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self._renew, self._on_lost = renew, on_lost
        self._period_seconds = lease_seconds / 3
        self._stopped = threading.Event()
        # What it logs bears what is bound here.
        run = partial(copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="lease-renewal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Renew no more. A renewal under way may still land; it can't take back what has been given back."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._period_seconds):
            try:
                holds = self._renew()
            except Exception as error:  # noqa: BLE001 - a thread that dies silently would lose every lease
                log.warning("lease_renewal_failed", error=type(error).__name__)
                continue
            if not holds:
                self._on_lost()
                return
