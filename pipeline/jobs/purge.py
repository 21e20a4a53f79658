"""Forget ended jobs: one by one in bounded transactions, or whole months by dropping their partitions. What was metered
stays, since it is the bill; so do Parquet files and tables of the user's own."""

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, Engine

from pipeline.core.errors import IllegalTransition
from pipeline.db import chunks, items, jobs, partitions, sql_requests
from pipeline.db.tables import PARTITIONED
from pipeline.jobs.status import known_job

#: Deleted at once.
_ROWS = 20_000
_JOBS = 1_000
#: Dropping a partition keeps everybody from its table, who then wait no longer than this.
_LOCK_SECONDS = 3.0


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

    @property
    def why_it_stays(self) -> str | None:
        """What is in the way, for a person."""
        return f"{self.unended:,} of its jobs haven't ended" if self.unended else None


def check_ended(connection: Connection, job_id: UUID) -> None:
    """Raise `IllegalTransition` if a job hasn't ended."""
    state = known_job(connection, job_id).state
    if not state.ended:
        raise IllegalTransition(f"job {job_id} is {state} and can't be purged; cancel it first.")


def purge_job(engine: Engine, job_id: UUID) -> dict[str, int]:
    """Forget a job that has ended. Returns how many rows went, by table. Cut off midway, it is there with some of its
    rows gone, can't be retried, and may be purged again.

    Raises:
        IllegalTransition: it hasn't ended.
    """
    with engine.begin() as connection:
        # From here on nobody retries it.
        if not jobs.give_up(connection, job_id):
            check_ended(connection, job_id)
        total = known_job(connection, job_id).items_total
    gone = dict.fromkeys(PARTITIONED, 0)
    for table in PARTITIONED:
        for first in range(0, total, _ROWS):
            with engine.begin() as connection:
                gone[table] += items.delete_range(connection, table, job_id, first, _ROWS)
    return {**gone, "chunks": _forget_job(engine, job_id)}


def _forget_job(engine: Engine, job_id: UUID) -> int:
    """Forget all of a job but what stands in partitions. Returns how many chunks it had."""
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
    """The months before `month` that have partitions; the current one, in which jobs are made, isn't among them."""
    end = min(month, partitions.this_month(connection))
    return [_month(connection, first) for first in partitions.months(connection) if first < end]


def _month(connection: Connection, first: datetime) -> Month:
    return Month(first, *jobs.count_between(connection, *_ids_of(first)))


def _ids_of(first: datetime) -> tuple[UUID, UUID]:
    """From which id to before which the jobs of a month are."""
    return partitions.lowest_id(first), partitions.lowest_id(partitions.next_month(first))


def purge_month(engine: Engine, first: datetime) -> str | None:
    """Forget a month's jobs and drop its partitions. Cut off midway, it may be purged again.

    Returns why it stays, if it does: a job that hasn't ended, or others who use the tables.
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
    # Each by itself: no two tables are locked at once, so that no commit is in a deadlock with it. `items` comes last,
    # since by its partitions a month is known.
    for table in reversed(PARTITIONED):
        with engine.begin() as connection:
            if not partitions.drop(connection, table, first, _LOCK_SECONDS):
                return f"others use {table} now; purge it again"
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
    """A month written as 2026-11; `None` where it isn't one."""
    try:
        return datetime.strptime(written, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        return None
