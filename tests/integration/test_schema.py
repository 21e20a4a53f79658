"""Database schema: migrations and partitions."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from uuid import UUID

import pytest
from alembic import command
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from pipeline.db import partitions
from pipeline.db.database import make_engine
from pipeline.db.migrate import alembic_config, upgrade
from pipeline.db.tables import PARTITIONED

#: Program that migrates: Alembic can run one migration per process.
_UPGRADE = """
import sys
from pipeline.cli.bootstrap import migrate_database
migrate_database(sys.argv[1])
"""


def month(year: int, number: int) -> datetime:
    return datetime(year, number, 1, tzinfo=UTC)


@contextmanager
def engine_on(url: str) -> Iterator[Engine]:
    engine = make_engine(url, application="vectormill-tests")
    try:
        yield engine
    finally:
        engine.dispose()


def tables(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.scalars(text("select tablename from pg_tables where schemaname = 'vectormill'")))


def test_the_migrations_make_what_the_code_expects(database: str) -> None:
    # Alembic takes the first schema of the search path for the default one; that may be one of the user's own name.
    with engine_on(f"{database}?options=-csearch_path%3Dpublic") as engine, engine.begin() as connection:
        command.check(alembic_config(connection))


def test_every_role_finds_the_operators_of_vectors(engine: Engine) -> None:
    with engine.connect() as connection:
        where = text("select extnamespace::regnamespace::text from pg_extension where extname = 'vector'")
        assert connection.execute(where).scalar_one() == "public"


def test_upgrading_again_changes_nothing(engine: Engine) -> None:
    before = tables(engine)
    with engine.begin() as connection:
        upgrade(connection)
    assert tables(engine) == before


def test_four_at_once_may_upgrade(empty_database: str) -> None:
    command = [sys.executable, "-c", _UPGRADE, empty_database]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate(timeout=240)[1], process.returncode) for process in processes] == [("", 0)] * 4
    with engine_on(empty_database) as engine, engine.connect() as connection:
        assert "jobs" in tables(engine)
        assert connection.execute(text("select count(*) from vectormill.workspaces")).scalar_one() == 1


def test_partitions_of_this_and_the_next_month_exist(engine: Engine) -> None:
    with engine.connect() as connection:
        now: datetime = connection.execute(text("select now() at time zone 'utc'")).scalar_one()
    this = month(now.year, now.month)
    wanted = {f"{table}_{when:%Y_%m}" for table in PARTITIONED for when in (this, partitions.next_month(this))}
    assert wanted <= tables(engine)


def test_four_at_once_may_make_a_month(engine: Engine) -> None:
    begin = threading.Barrier(4)

    def run(_: int) -> None:
        with engine.begin() as connection:
            begin.wait(120)
            partitions.make_month(connection, month(2021, 12))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert {f"{table}_2021_12" for table in PARTITIONED} <= tables(engine)


def test_nobody_waits_for_ever_to_make_a_month(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_LOCK_SECONDS", 0.1)
    with engine.connect() as other, engine.connect() as connection:
        # Any login may hold this lock, which was once waited for.
        other.execute(text("select pg_advisory_lock(1987932257)"))
        partitions.make_month(connection, month(2022, 1))
        assert connection.execute(text("show lock_timeout")).scalar_one() == "0"
        connection.rollback()
        other.execute(text("lock table vectormill.items in share update exclusive mode"))
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.make_month(connection, month(2022, 1))


@pytest.mark.parametrize("asked", ["1969-12-01", "2019-12-31", "9999-01-01", None])
def test_months_in_which_no_job_is_made_get_no_partitions(engine: Engine, asked: str | None) -> None:
    before = tables(engine)
    with engine.connect() as connection, pytest.raises(DBAPIError, match="set the clocks right"):
        connection.execute(text("select vectormill.make_partitions(:month)"), {"month": asked})
    assert tables(engine) == before


def test_partitions_are_made_three_months_ahead_and_no_further(engine: Engine) -> None:
    ask = "select vectormill.make_partitions((date_trunc('month', now()) + make_interval(months => :months))::date)"
    with engine.connect() as connection:
        connection.execute(text(ask), {"months": 3})
        with pytest.raises(DBAPIError, match="three months from now"):
            connection.execute(text(ask), {"months": 4})


@pytest.mark.parametrize(
    ("this", "following"),
    [((2026, 1), (2026, 2)), ((2026, 11), (2026, 12)), ((2026, 12), (2027, 1)), ((2028, 2), (2028, 3))],
)
def test_the_month_after(this: tuple[int, int], following: tuple[int, int]) -> None:
    assert partitions.next_month(month(*this)) == month(*following)


@pytest.mark.parametrize(
    ("moment", "wanted"),
    [
        (datetime(2026, 12, 31, 23, 59, 59, 999000, UTC), month(2026, 12)),
        (datetime(2027, 1, 1, tzinfo=UTC), month(2027, 1)),
    ],
)
def test_the_month_of_a_job(moment: datetime, wanted: datetime) -> None:
    job_id = UUID(int=round(moment.timestamp() * 1000) << 80)
    assert partitions.month_of(job_id) == wanted


def test_a_months_last_and_first_ids_find_their_partitions(engine: Engine) -> None:
    border = int(month(2021, 1).timestamp() * 1000)
    with engine.begin() as connection:
        partitions.make_month(connection, month(2020, 12))
        partitions.make_month(connection, month(2021, 1))
        insert = text(
            "insert into vectormill.items (job_id, index) values (:job, 0) returning tableoid::regclass::text"
        )
        for milliseconds, name in ((border - 1, "items_2020_12"), (border, "items_2021_01")):
            found = connection.execute(insert, {"job": UUID(int=milliseconds << 80 | 7)}).scalar_one()
            assert found.removeprefix("vectormill.") == name
