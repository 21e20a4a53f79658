"""Processes with one thing changed: workers by `celery -A tests.acceptance.mutants`, dispatchers by
`python -m tests.acceptance.mutants dispatcher`.

The module is in the app's `include`, so that spawned children are changed as well; which change they get is said by
the environment, since a child imports the module afresh.
"""

import os
import signal
from contextlib import suppress
from typing import Any

from pipeline.store import chunks
from tests.acceptance.fleet import POISON
from workers.app import app

app.conf.include = [*app.conf.include, __name__]


def _without_fence() -> None:
    """Whoever commits is believed."""
    chunks.OURS = "cast(:fence as bigint) is not null"


def _without_renewal() -> None:
    """Nobody renews a lease."""
    from pipeline.leases import Renewal

    Renewal._run = lambda self: None  # type: ignore[method-assign]


def _without_sweep() -> None:
    """Leases that run out are left as they are."""
    chunks.expire_leases = lambda *_: []


def _without_one_transaction() -> None:
    """The chunk is committed before its vectors are."""
    record = chunks.record

    def record_at_once(connection: Any, *arguments: Any) -> bool:
        done = record(connection, *arguments)
        driver = connection.connection.driver_connection
        driver.execute("commit and chain")
        return done

    chunks.record = record_at_once  # type: ignore[assignment]


def _poisonable() -> None:
    from workers.encoder import Encoder

    read = Encoder.tokenise

    def tokenise(self, texts, *arguments, **named):  # type: ignore[no-untyped-def]
        if any(text.startswith(POISON) for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, texts, *arguments, **named)

    Encoder.tokenise = tokenise  # type: ignore[method-assign]


def _dying_in_parts() -> None:
    """Children die between writing a part and recording it, until `DEATHS` files are there."""
    from pipeline import parts

    write = parts.write

    def write_and_die(*arguments: Any) -> Any:
        written = write(*arguments)
        for death in os.environ["DEATHS"].split(","):
            with suppress(FileExistsError):
                os.close(os.open(death, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return written

    parts.write = write_and_die  # type: ignore[assignment]


def _talkative() -> None:
    """Library code logs while a chunk is read, and while its lease is renewed before it goes on."""
    import logging
    import threading

    from workers.encoder import Encoder

    said, renewed = logging.getLogger("some.library"), threading.Event()
    read, renew = Encoder.tokenise, chunks.renew

    def tokenise(self, texts, *arguments, **named):  # type: ignore[no-untyped-def]
        if len(texts) > 3:  # the model's own proofs are of fewer
            said.warning("tokenising")
            renewed.wait()
        return read(self, texts, *arguments, **named)

    def renew_aloud(*arguments: Any, **named: Any) -> Any:
        if not renewed.is_set():
            said.warning("renewing")
            renewed.set()
        return renew(*arguments, **named)

    Encoder.tokenise, chunks.renew = tokenise, renew_aloud  # type: ignore[method-assign]


_MUTANTS = {
    "dying_in_parts": _dying_in_parts,
    "poisonable": _poisonable,
    "talkative": _talkative,
    "without_fence": _without_fence,
    "without_one_transaction": _without_one_transaction,
    "without_renewal": _without_renewal,
    "without_sweep": _without_sweep,
}
_MUTANTS[os.environ["MUTANT"]]()

if __name__ == "__main__":
    from pipeline.cli import main

    main()
