"""Forget ended jobs: one by one in bounded transactions, or whole months by dropping their partitions. What was metered
stays, since it is the bill; so do Parquet files, which are the user's."""

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from pipeline.errors import IllegalTransition
from pipeline.jobs import JobState
from pipeline.status import job_row
from pipeline.store import chunks, items, jobs, partitions
from pipeline.tables import PARTITIONED

_ROWS = 20_000
_JOBS = 1_000
_FIRST = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Month:
    """A month's partitions, and what is in the way of dropping them."""

    first: datetime
    jobs: int
    #: Jobs made in it that haven't ended.
    unended: int

    @property
    def name(self) -> str:
        """The month as people write it: 2026-11."""
        return f"{self.first:%Y-%m}"


def check_ended(connection: Connection, job_id: UUID) -> None:
    """Raise `IllegalTransition` if a job hasn't ended."""
    state = JobState(job_row(connection, job_id)["state"])
    if not state.ended:
        raise IllegalTransition(f"job {job_id} is {state} and can't be purged; cancel it first.")


def purge_job(engine: Engine, job_id: UUID) -> None:
    """Forget a job that has ended. Cut off midway, it is there with some of its rows gone, and may be purged again.

    Raises:
        IllegalTransition: it hasn't ended.
    """
    with engine.begin() as connection:
        check_ended(connection, job_id)
    for table in PARTITIONED:
        gone = _ROWS
        while gone == _ROWS:
            with engine.begin() as connection:
                gone = items.delete_rows(connection, table, job_id, _ROWS)
    _delete_job(engine, job_id)


def _delete_job(engine: Engine, job_id: UUID) -> None:
    gone = _ROWS
    while gone == _ROWS:
        with engine.begin() as connection:
            gone = chunks.delete_some(connection, job_id, _ROWS)
    with engine.begin() as connection:
        jobs.delete(connection, job_id)


def months_before(connection: Connection, month: datetime) -> list[Month]:
    """The months before `month` that have partitions."""
    found = []
    for first in partitions.months(connection):
        if first < month:
            count, unended = jobs.count_between(
                connection, partitions.lowest_id(first), partitions.lowest_id(partitions.next_month(first))
            )
            found.append(Month(first, count, unended))
    return found


def purge_month(engine: Engine, month: Month) -> None:
    """Drop a month's partitions, and forget its jobs. Jobs of the month must all have ended."""
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        partitions.drop_month(connection, month.first)
    end = partitions.lowest_id(partitions.next_month(month.first))
    after = UUID(int=partitions.lowest_id(month.first).int - 1)
    while True:
        with engine.begin() as connection:
            page = jobs.made_before(connection, end, after, _JOBS)
        if not page:
            return
        for row in page:
            _delete_job(engine, row["id"])
        after = page[-1]["id"]


def parse_month(written: str) -> datetime | None:
    """A month written as 2026-11; `None` where it isn't one."""
    try:
        return datetime.strptime(written, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        return None
