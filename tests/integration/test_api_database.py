"""What the api knows from Postgres and writes to it, when Postgres is slow or fails."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pipeline.api import directory as directory_module
from pipeline.api import metering
from pipeline.api.bulk import Bulk
from pipeline.api.database import Database
from pipeline.api.directory import Directory
from pipeline.api.metering import Meter
from pipeline.errors import ModelNotFound, UpstreamUnavailable
from pipeline.store import models, usage
from tests.acceptance.fleet import eventually
from tests.jobs_made import run_sql


def row(number: int, tokens: int = 1) -> Mapping[str, Any]:
    return {
        "workspace_id": 1,
        "key_id": "k",
        "request_id": f"req_{number}",
        "model": "m",
        "items": 1,
        "tokens": tokens,
        "truncated": 0,
        "end_user": None,
        "price_per_million": None,
        "created_at": datetime.now(UTC),
    }


def written(engine: Engine) -> int:
    return int(run_sql(engine, "select count(*) from vectormill.usage")[0][0])


@pytest.mark.parametrize("error", [PoolTimeout("no connection"), RuntimeError("whatever it is")])
def test_the_writer_survives_what_writing_raises(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = 0

    def failing(*_: Any) -> None:
        nonlocal tried
        tried += 1
        raise error

    async def body() -> None:
        meter = Meter(Database(engine))
        monkeypatch.setattr(usage, "add_requests", failing)
        meter.add(row(1))
        while tried < 2:
            await asyncio.sleep(0.01)
        monkeypatch.undo()
        meter.add(row(2))
        while await asyncio.to_thread(written, engine) < 2:
            await asyncio.sleep(0.01)
        await meter.close()

    asyncio.run(asyncio.wait_for(body(), 120))


def test_closing_waits_for_the_write_under_way_and_writes_the_rest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, under_way, going = usage.add_requests, threading.Event(), threading.Event()

    def slow(connection: Connection, rows: Any) -> None:
        add(connection, rows)
        under_way.set()
        going.wait(120)

    monkeypatch.setattr(usage, "add_requests", slow)

    async def body() -> None:
        meter = Meter(Database(engine))
        for number in range(1_500):
            meter.add(row(number))
        while not under_way.is_set():
            await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(meter.close())
        await asyncio.sleep(0)
        meter.add(row(1_500))
        going.set()
        await closing
        assert not meter._rows

    asyncio.run(asyncio.wait_for(body(), 120))
    assert written(engine) == 1_501


def test_closing_gives_a_frozen_database_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "_LAST_SECONDS", 0.3)
    with engine.connect() as other, other.begin():
        other.execute(text("lock table vectormill.usage in access exclusive mode"))

        async def body() -> None:
            meter = Meter(Database(engine))
            meter.add(row(1))
            await meter.close()

        asyncio.run(asyncio.wait_for(body(), 120))
    eventually(lambda: written(engine) == 1, "the write that went on")


def test_a_months_sum_that_takes_long_holds_up_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_MONTH_FRESH_SECONDS", 0.0)
    with engine.begin() as connection:
        usage.add_requests(connection, [row(1, tokens=10)])

    async def body() -> None:
        known = Directory(Database(engine))
        assert (await known.month(1))[0] == 10
        with engine.connect() as other, other.begin():
            usage.add_requests(other, [row(2, tokens=5)])
            other.execute(text("lock table vectormill.usage in access exclusive mode"))
            for _ in range(5):
                assert (await asyncio.wait_for(known.month(1), 60))[0] == 10
        while (await known.month(1))[0] != 15:
            await asyncio.sleep(0.01)
        # The last question's thread is done with the engine.
        while known._months._under_way:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(body(), 120))


def test_a_months_sum_needs_the_index_alone(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("set enable_seqscan = off"))
        seen: list[str] = []

        @event.listens_for(connection, "before_cursor_execute")
        def _note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            seen.append(statement)

        usage.this_month(connection, 1)
        plan = connection.exec_driver_sql("explain " + seen[0], {"workspace": 1}).scalars().all()
    assert any("Index Only Scan using usage_workspace_idx" in line for line in plan), plan


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "none"])
def test_what_cant_be_a_name_isnt_asked_for(engine: Engine, name: str) -> None:
    async def body() -> None:
        with pytest.raises(ModelNotFound):
            await Directory(Database(engine)).model(1, name)

    asyncio.run(body())


def test_a_defect_isnt_taken_for_an_outage(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_: Any) -> None:
        raise KeyError("price")

    async def body() -> None:
        database = Database(engine)
        monkeypatch.setattr(models, "find", defective)
        with pytest.raises(KeyError):
            await Directory(database).model(1, "static")
        assert database.seconds_since_failure == float("inf")

    asyncio.run(body())


def test_a_reply_in_pieces_begins_when_its_first_is_there(engine: Engine) -> None:
    few = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1)

    def pieces() -> Iterator[bytes]:
        for number in range(2):
            with few.begin() as connection:
                yield str(connection.execute(text(f"select {number}")).scalar_one()).encode()

    async def body() -> None:
        bulk = Bulk(few)
        with few.connect(), pytest.raises(UpstreamUnavailable):
            await bulk.begin(pieces)
        assert list(await bulk.begin(pieces)) == [b"0", b"1"]
        assert list(await bulk.begin(lambda: iter(()))) == [b""]
        bulk.close()

    asyncio.run(body())
    few.dispose()
