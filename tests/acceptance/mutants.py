"""Mutants: processes with one behaviour changed. Workers start by `celery -A tests.acceptance.mutants`, dispatchers by
`python -m tests.acceptance.mutants dispatcher`.

The module is in the app's `include`, so that children are changed as well. The environment variable `MUTANT` selects
the change, since a child imports the module itself.
"""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

from pipeline.db import chunks, lost_claims
from tests.acceptance.poison import Poison
from workers.encoders.reading import Ids
from workers.runner.app import app

app.conf.include = [*app.conf.include, __name__]


def _without_fence() -> None:
    """Accept commits under any fence."""
    chunks.OURS = "cast(:fence as bigint) is not null"


def _without_renewal() -> None:
    """Never renew a lease."""
    from pipeline.infra.leases import Renewal

    Renewal._run = lambda self: None  # type: ignore[method-assign]


def _without_sweep() -> None:
    """Never expire a lease."""
    lost_claims.expire_leases = lambda *_: []


def _without_one_transaction() -> None:
    """Commit the chunk's row before its vectors."""
    record = chunks.record

    def record_at_once(connection: Any, *arguments: Any, **named: Any) -> bool:
        done = record(connection, *arguments, **named)
        driver = connection.connection.driver_connection
        driver.execute("commit and chain")
        return done

    chunks.record = record_at_once


def _poisonable() -> None:
    """Let some texts do harm when the model reads them, and detect a hang early."""
    from workers.encoders.local import LocalEncoder
    from workers.runner import tasks

    tasks._LEAST_HANG_SECONDS, tasks._HANG_FACTOR = 5.0, 3
    forward = LocalEncoder._forward
    heads: dict[Poison, list[int]] = {}
    broken: list[int] = []

    def met(self: LocalEncoder, ids: list[Ids]) -> dict[Poison, list[int]]:
        if not heads:
            tokenised = self._documents.reader.read([poison.value for poison in Poison], None)
            heads.update(zip(Poison, (_words(self, one) for one in tokenised.ids), strict=True))
        return {
            poison: at
            for poison, head in heads.items()
            if (at := [n for n, one in enumerate(ids) if _words(self, one)[: len(head)] == head])
        }

    def run(self: LocalEncoder, ids: list[Ids]) -> Any:
        found = met(self, ids)
        broken.extend(found.get(Poison.BREAKS, []))
        if broken:
            raise RuntimeError("the device is lost")
        if Poison.KILLS in found:
            os.kill(os.getpid(), signal.SIGKILL)
        if Poison.HANGS in found:
            threading.Event().wait()
        if Poison.RAISES in found:
            raise RuntimeError("an operator that isn't there")
        vectors = forward(self, ids).clone()
        vectors[found.get(Poison.MAKES_NAN, [])] = float("nan")
        return vectors

    LocalEncoder._forward = run  # type: ignore[method-assign]


def _words(encoder: Any, ids: Any) -> list[int]:
    """Return the ids without the special tokens around a text, which a model with attention has."""
    return list(ids) if encoder._documents.reader.flat else list(ids)[1:-1]


def _dying_at_load() -> None:
    """Kill each process as soon as it runs anything on the device, as a broken driver does."""
    from workers.encoders.local import LocalEncoder

    LocalEncoder.prove = lambda self, expected: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


def _losing_the_device() -> None:
    """Make the device fail for a process after six batches; a new process can use it again."""
    from workers.encoders.local import LocalEncoder

    forward, left = LocalEncoder._forward, [6]

    def run(self: LocalEncoder, ids: list[Ids]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is lost")
        return forward(self, ids)

    LocalEncoder._forward = run  # type: ignore[method-assign]


def _dying_in_parts() -> None:
    """Kill children between writing a part and recording it, until all files named in `DEATHS` exist."""
    from pipeline.chunk_io import parquet_parts

    write = parquet_parts.write

    def write_and_die(*arguments: Any) -> Any:
        written = write(*arguments)
        for death in os.environ["DEATHS"].split(","):
            with suppress(FileExistsError):
                os.close(os.open(death, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return written

    parquet_parts.write = write_and_die  # type: ignore[assignment]


def _talkative() -> None:
    """Log from library code while a chunk is read, and hold the reading until library code has logged in a renewal."""
    import logging

    from workers.encoders.local import LocalEncoder

    said, renewed = logging.getLogger("some.library"), threading.Event()
    read, renew = LocalEncoder.tokenise, chunks.renew

    def tokenise(self, texts, *arguments, **named):  # type: ignore[no-untyped-def]
        if len(texts) > 3:  # the canary check tokenises one text
            said.warning("tokenising")
            renewed.wait()
        return read(self, texts, *arguments, **named)

    def renew_aloud(*arguments: Any, **named: Any) -> Any:
        if not renewed.is_set():
            said.warning("renewing")
            renewed.set()
        return renew(*arguments, **named)

    LocalEncoder.tokenise, chunks.renew = tokenise, renew_aloud  # type: ignore[method-assign]


_MUTANTS = {
    "dying_in_parts": _dying_in_parts,
    "dying_at_load": _dying_at_load,
    "losing_the_device": _losing_the_device,
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
