"""Embedded servers of a machine, in a thread of the tests."""

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.embedded.machine import Machine, Stages
from pipeline.embedded.place import Place
from pipeline.embedded.runtime import Running
from pipeline.infra.settings import Settings


@contextmanager
def running_servers(home: Path, prepare: Callable[[str], None], stages: Stages = lambda _: ()) -> Iterator[Running]:
    """Run a machine for the length of the block. Errors while it starts in its thread are raised here."""
    machine = Machine(Settings(home=home, database_url=None, redis_url=None), prepare=prepare, stages=stages)
    ready: queue.SimpleQueue[Running | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            machine.run(ready.put)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            ready.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        started = ready.get()
        if isinstance(started, BaseException):
            raise started
        yield started
    finally:
        machine.request_stop()
        thread.join()


def remove_what_root_keeps(home: Path) -> None:
    """Remove the programs and data that root's home keeps elsewhere, incomplete ones too."""
    folder = Place.of_home(home).folder
    for each in (folder, *folder.parent.glob(f"{folder.name}.new-*")):
        shutil.rmtree(each, ignore_errors=True)
