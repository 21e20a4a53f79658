"""Concurrency limits shared by workspaces: none of them can take every place."""

import asyncio
from collections.abc import Callable
from weakref import WeakValueDictionary


class FairSemaphore:
    """Semaphore with a limit for all workspaces together, and a lower one for each."""

    def __init__(self, in_all: int, of_one: int) -> None:
        self._all, self._of_one = asyncio.Semaphore(in_all), of_one
        self._workspaces: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    async def take(self, workspace_id: int) -> Callable[[], None]:
        """Wait for a place, first come first served, and return the function that gives it back.

        A caller that waits for others of its own workspace doesn't hold up other workspaces.
        """
        own = self._workspaces.get(workspace_id)
        if own is None:
            own = self._workspaces[workspace_id] = asyncio.Semaphore(self._of_one)
        await own.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            own.release()
            raise

        def give_back() -> None:
            self._all.release()
            own.release()

        return give_back
