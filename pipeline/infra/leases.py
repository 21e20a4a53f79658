"""Lease renewal by a background thread (heartbeat) while the lease's holder works."""

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Self

import structlog

log = structlog.get_logger()

_LAST_SECONDS = 1.0


class Renewal:
    """A thread that calls `renew` every third of a lease, for the length of the `with` block.

    `renew` returns True while the lease holds. If a call raises (the database is away), it is retried after the same
    interval: only the database can tell if the lease outlived the gap. When the lease is lost, `on_lost` is called
    and the renewal ends.
    """

    def __init__(
        self, renew: Callable[[], bool], lease_seconds: float, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self._renew, self._on_lost = renew, on_lost
        self._period_seconds = lease_seconds / 3
        self._stopped = threading.Event()
        # The thread's log lines carry the context that is bound here.
        run = partial(copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="lease-renewal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing, and wait a moment for a renewal in progress, so that its connection isn't left behind. One
        that takes longer may still arrive, but can't take back a lease that was given up."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST_SECONDS)

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
