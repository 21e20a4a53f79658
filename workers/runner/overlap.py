"""Calls of a chunk's last commits, which are written while the next block is embedded."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from types import TracebackType
from typing import Self


class InOrder(AbstractContextManager["InOrder"]):
    """Calls in a thread, one after the other, each begun when the one before has succeeded. At most one is under way.

    A call's error is raised by the next `begin` or `wait`. Leaving the `with` block waits for the call under way.
    """

    def __init__(self, on_error: Callable[[], None]) -> None:
        """Create the thread. It calls `on_error` when a call fails."""
        self._on_error = on_error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def begin(self, call: Callable[[], None]) -> None:
        """Wait for the call before this one, and begin this one."""
        self.wait()
        self._under_way = self._thread.submit(copy_context().run, self._run, call)

    def wait(self) -> None:
        """Wait for the call under way, and raise its error."""
        if under_way := self._under_way:
            self._under_way = None
            under_way.result()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException:
            self._on_error()
            raise
