"""Places that workspaces share: whatever one of them does, it leaves some for others."""

import asyncio
from collections.abc import Callable
from weakref import WeakValueDictionary


class Places:
    """So many places in all, and fewer for one workspace."""

    def __init__(self, in_all: int, of_one: int) -> None:
        self._all, self._of_one = asyncio.Semaphore(in_all), of_one
        self._workspaces: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    async def take(self, workspace_id: int) -> Callable[[], None]:
        """Wait for a place, in the order of asking; who waits for others of the same workspace isn't in the others'
        line. Returns what gives it back."""
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
