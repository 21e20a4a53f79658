"""Purge of ended jobs: single jobs in bounded transactions, or whole months by dropping their partitions.

The usage stays, since it is the bill, and so do Parquet files and the user's own tables.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, Engine

from pipeline.core.errors import IllegalTransition
from pipeline.db import chunks, items, jobs, known_texts, partitions, sql_requests
from pipeline.db.tables import PARTITIONED
from pipeline.jobs.status import known_job

#: The most rows or jobs deleted at once.
_ROWS = 20_000
_JOBS = 1_000
#: Lock timeout of dropping a partition, which blocks all others from the table while it waits.
_LOCK_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Month:
    """A month's partitions, with the numbers of jobs created in that month."""

    first: datetime
    jobs: int
    #: Jobs that haven't ended.
    unended: int

    @property
    def name(self) -> str:
        """The month as text: 2026-11."""
        return f"{self.first:%Y-%m}"

    @property
    def why_it_stays(self) -> str | None:
        """Reason why the partitions can't be dropped, for a person; `None`: they can."""
        return f"{self.unended:,} of its jobs haven't ended" if self.unended else None


def check_ended(connection: Connection, job_id: UUID) -> None:
    """Check that a job has ended.

    Raises:
        IllegalTransition: it hasn't.
    """
    state = known_job(connection, job_id).state
    if not state.ended:
        raise IllegalTransition(f"job {job_id} is {state} and can't be purged; cancel it first.")


def purge_job(engine: Engine, job_id: UUID) -> dict[str, int]:
    """Delete a job that has ended. Return the number of deleted rows by table.

    After an interruption the job is still there, without some of its rows; it can't be retried, and may be purged
    again.

    Raises:
        IllegalTransition: it hasn't ended.
    """
    with engine.begin() as connection:
        # From here on the job can't be retried.
        if not jobs.give_up(connection, job_id):
            check_ended(connection, job_id)
        total = known_job(connection, job_id).items_total
    gone = dict.fromkeys(PARTITIONED, 0)
    for table in PARTITIONED:
        for first in range(0, total, _ROWS):
            with engine.begin() as connection:
                gone[table] += items.delete_range(connection, table, job_id, first, _ROWS)
    _forget_texts(engine, job_id, UUID(int=job_id.int + 1))
    return {**gone, "chunks": _forget_job(engine, job_id)}


def _forget_texts(engine: Engine, first_id: UUID, end_id: UUID) -> None:
    """Forget which texts were first given to jobs of a range; nobody is kept from taking them over meanwhile."""
    gone = _ROWS
    while gone == _ROWS:
        with engine.begin() as connection:
            gone = known_texts.forget(connection, first_id, end_id, _ROWS)


def _forget_job(engine: Engine, job_id: UUID) -> int:
    """Delete a job, except its rows in partitions. Return the number of its chunks."""
    chunks_gone, gone = 0, _ROWS
    while gone == _ROWS:
        with engine.begin() as connection:
            gone = chunks.delete_some(connection, job_id, _ROWS)
        chunks_gone += gone
    with engine.begin() as connection:
        if jobs.delete(connection, job_id):
            sql_requests.delete(connection, job_id)
    return chunks_gone


def months_before(connection: Connection, month: datetime) -> list[Month]:
    """Return the months before `month` that have partitions, without the current one, in which jobs are created."""
    end = min(month, partitions.this_month(connection))
    return [_month(connection, first) for first in partitions.months(connection) if first < end]


def _month(connection: Connection, first: datetime) -> Month:
    return Month(first, *jobs.count_between(connection, *_ids_of(first)))


def _ids_of(first: datetime) -> tuple[UUID, UUID]:
    """Return the range of a month's job ids: the first one, and the first one after it."""
    return partitions.lowest_id(first), partitions.lowest_id(partitions.next_month(first))


def purge_month(engine: Engine, first: datetime) -> str | None:
    """Delete a month's jobs and drop its partitions. After an interruption it may be purged again.

    Return the reason why it stays, or `None`: a job hasn't ended, or other sessions use the tables.
    """
    with engine.begin() as connection:
        why = _month(connection, first).why_it_stays
    if why:
        return why
    _forget_jobs(engine, *_ids_of(first))
    with engine.begin() as connection:
        sql_requests.delete_between(connection, *_ids_of(first))
        why = _month(connection, first).why_it_stays
    if why:
        return why
    # One transaction per table: no two tables are locked at once, so that no commit can deadlock with it. `items` comes
    # last, since its partitions tell which months exist.
    for table in reversed(PARTITIONED):
        with engine.begin() as connection:
            if not partitions.drop(connection, table, first, _LOCK_SECONDS):
                return f"{table} is in use by other sessions; purge the month again later"
    _forget_texts(engine, *_ids_of(first))
    return None


def _forget_jobs(engine: Engine, first_id: UUID, end_id: UUID) -> None:
    while True:
        with engine.begin() as connection:
            page = jobs.ids_between(connection, first_id, end_id, _JOBS)
        for job_id in page:
            with engine.begin() as connection:
                given_up = jobs.give_up(connection, job_id)
            if given_up:
                _forget_job(engine, job_id)
        if len(page) < _JOBS:
            return
        first_id = UUID(int=page[-1].int + 1)


def parse_month(written: str) -> datetime | None:
    """Return the first moment of a month written as 2026-11, in UTC; `None`: the text isn't a month."""
    try:
        return datetime.strptime(written, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        return None
