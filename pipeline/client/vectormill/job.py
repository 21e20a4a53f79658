"""Jobs, and what comes of them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import UUID

from . import calls
from .errors import JobNotCompleted, ServiceUnreachable, UserError, WaitTimedOut
from .progress import Progress
from .records import Hit, JobStatus, Receipt, Reject
from .transport import Transport

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

_POLL_SECONDS, _SLOWEST_POLL_SECONDS = 0.25, 2.0
#: Time for which a wait bears with an api that doesn't answer.
_PATIENCE_SECONDS = 60.0


class Watch:
    """Wait for a job: when it ends, and how long an api that is away is waited for."""

    def __init__(self, timeout: float | None) -> None:
        now = time.monotonic()
        self._timeout, self._deadline = timeout, now + (float("inf") if timeout is None else timeout)
        self._answered, self.pause_seconds = now, _POLL_SECONDS

    def look(self, job: str, status: JobStatus | ServiceUnreachable) -> JobStatus | None:
        """Return the status of a job that is completed; `None`: it goes on.

        Raises:
            JobNotCompleted: it has failed, was cancelled, or was paused by the system.
            WaitTimedOut: the time is over.
            ServiceUnreachable: the api is away for too long.
        """
        now = time.monotonic()
        self.pause_seconds = min(self.pause_seconds * 1.5, _SLOWEST_POLL_SECONDS)
        if isinstance(status, JobStatus):
            self._answered = now
            if status.state == "completed":
                return status
            if status.ended or (status.state == "paused" and status.reason != "by_user"):
                raise JobNotCompleted(status)
        elif now - self._answered > _PATIENCE_SECONDS:
            raise status
        if now >= self._deadline:
            raise WaitTimedOut(f"job {job} isn't completed after {self._timeout:,.0f} s; it goes on.")
        return None


class Job:
    """A job. Iterated over, it gives its rows: `index`, `key`, `embedding`, `tokens`, `truncated`, and so on."""

    def __init__(self, transport: Transport, job: str, *, made: JobStatus | None = None) -> None:
        self._transport, self._job, self._made = transport, job, made

    @property
    def id(self) -> UUID:
        """The job's id. Once it is known, a later job of its name isn't taken for it."""
        return (self._made or self.status()).id

    @property
    def _id(self) -> str:
        return str(self.id)

    @property
    def name(self) -> str:
        """The job's name."""
        return (self._made or self.status()).name

    def __repr__(self) -> str:
        return f"<vectormill.Job {self._made.id if self._made else self._job}>"

    def status(self) -> JobStatus:
        """Return the job's state and progress."""
        self._made = self._transport.send(calls.job_status(self._id if self._made else self._job))
        return self._made

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> JobStatus:
        """Wait until the job is completed. Return its last status.

        Args:
            timeout: seconds.
            progress: show a bar. Default: in a terminal, and in a notebook.

        Raises:
            JobNotCompleted: it has failed, was cancelled, or was paused by the system.
            WaitTimedOut: it isn't completed in that time; it goes on.
            ServiceUnreachable: the api doesn't answer for a minute.
        """
        watch = Watch(timeout)
        with Progress(progress) as bar:
            while True:
                try:
                    status = self.status()
                    bar.show(status)
                    done = watch.look(self._job, status)
                except ServiceUnreachable as error:
                    done = watch.look(self._job, error)
                if done:
                    return done
                time.sleep(watch.pause_seconds)

    def cancel(self) -> JobStatus:
        """Cancel the job. What is committed stays."""
        return self._transport.send(calls.steering(self._id, "cancel"))

    def pause(self) -> JobStatus:
        """Pause the job: no further chunk starts."""
        return self._transport.send(calls.steering(self._id, "pause"))

    def resume(self) -> JobStatus:
        """Resume the paused job."""
        return self._transport.send(calls.steering(self._id, "resume"))

    def retry(self) -> int:
        """Try again what may succeed. Return the number of chunks that are open again."""
        return self._transport.send(calls.retry(self._id))

    def receipt(self) -> Receipt:
        """Return the job's account at its end, or so far; `receipt().verify()` counts the rows one by one."""
        job = self._id
        found = self._transport.send(calls.receipt(job, verify=False))
        return replace(found, counting=lambda: self._transport.send(calls.receipt(job, verify=True)))

    def rejects(self) -> Iterator[Reject]:
        """Yield the items that can't be embedded, each with its code and the reason."""
        return map(Reject.of, self._lines("rejects"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._lines("results")

    def _lines(self, what: str) -> Iterator[Any]:
        with self._transport.stream(calls.job_path(self._id, what), format="jsonl") as reply:
            for line in reply.iter_lines():
                yield json.loads(line)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vectors to a `.parquet` or `.jsonl` file, which appears once it is complete. Return its path."""
        to = Path(path)
        kind = to.suffix.removeprefix(".")
        if kind not in ("parquet", "jsonl"):
            raise UserError(f"{to}: give a file that ends in .parquet or .jsonl.")
        partial = to.with_name(f".{to.name}.partial")
        try:
            path_there = calls.job_path(self._id, "results")
            with self._transport.stream(path_there, format=kind) as reply, partial.open("wb") as file:
                for piece in reply.iter_bytes():
                    file.write(piece)
            partial.replace(to)
        finally:
            partial.unlink(missing_ok=True)
        return to

    def to_arrow(self) -> "pyarrow.Table":
        """Return the vectors as an Arrow table, in index order."""
        import pyarrow.parquet as pq

        with TemporaryDirectory(prefix="vectormill-") as folder:
            return pq.read_table(self.save(Path(folder) / "results.parquet"))

    def to_polars(self) -> "polars.DataFrame":
        """Return the vectors as a Polars data frame."""
        import polars

        frame = polars.from_arrow(self.to_arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the vectors as a pandas data frame."""
        return self.to_arrow().to_pandas()

    def search(self, query: str, k: int = 10, *, where: Mapping[str, str] | None = None) -> list[Hit]:
        """Return the `k` items nearest to a query in words, of those with these carried values."""
        return self._transport.send(calls.search(calls.job_path(self._id), query, k, where))
