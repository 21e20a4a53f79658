"""Reads and writes of the API when Postgres is slow or fails."""

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.types import Message

from pipeline.api.database import Database
from pipeline.api.fair_semaphore import FairSemaphore
from pipeline.api.gateway import cache as cache_module
from pipeline.api.gateway import metering
from pipeline.api.gateway.cache import Caller, GatewayCache
from pipeline.api.gateway.metering import Meter
from pipeline.api.transfers import DOWNLOADS_OF_ONE, Transfers
from pipeline.catalog import keys
from pipeline.catalog import models as catalog
from pipeline.core.errors import Busy, InvalidApiKey, ModelNotFound, UpstreamUnavailable
from pipeline.db import keys as stored_keys
from pipeline.db import models, usage
from pipeline.infra import metrics
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import run_sql


@pytest.fixture(autouse=True)
def _questions_end(engine: Engine) -> Iterator[None]:
    """Wait for the database threads before the engine is disposed of: nobody closes a connection that comes back
    later. This asks for `engine` so that it is torn down first."""
    yield
    for thread in threading.enumerate():
        if thread.name == "database":
            thread.join(60)


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
    monkeypatch.setattr(cache_module, "_MONTH_FRESH_SECONDS", 0.0)
    with engine.begin() as connection:
        usage.add_requests(connection, [row(1, tokens=10)])

    async def body() -> None:
        known = GatewayCache(Database(engine))
        assert (await known.month(1))[0] == 10
        with engine.connect() as other, other.begin():
            usage.add_requests(other, [row(2, tokens=5)])
            other.execute(text("lock table vectormill.usage in access exclusive mode"))
            for _ in range(5):
                assert (await asyncio.wait_for(known.month(1), 60))[0] == 10
        while (await known.month(1))[0] != 15:
            await asyncio.sleep(0.01)
        # The last query's thread must be done with the engine.
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
            await GatewayCache(Database(engine)).model(1, name)

    asyncio.run(body())


def test_a_defect_isnt_taken_for_an_outage(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_: Any) -> None:
        raise KeyError("price")

    async def body() -> None:
        database = Database(engine)
        monkeypatch.setattr(models, "find", defective)
        with pytest.raises(KeyError):
            await GatewayCache(database).model(1, "static")
        assert database.seconds_since_failure == float("inf")

    asyncio.run(body())


def test_invented_keys_are_asked_for_together_and_kept_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand invented keys cost few queries, no database failure and no known key."""
    monkeypatch.setattr(cache_module, "_MOST_KEPT", 100)
    with engine.begin() as connection:
        token = keys.create(connection, catalog.workspace_id(connection), "test").token
    asked: list[int] = []
    find = stored_keys.find_live

    def counted(connection: Connection, key_ids: Sequence[str]) -> Any:
        asked.append(len(key_ids))
        return find(connection, key_ids)

    monkeypatch.setattr(stored_keys, "find_live", counted)

    async def body() -> None:
        database = Database(engine)
        known = GatewayCache(database)
        await known.caller(f"Bearer {token}")
        invented = [known.caller(f"Bearer vm_{number:016x}_{'a' * 43}") for number in range(1_000)]
        answers = await asyncio.gather(*invented, known.caller(f"Bearer {token}"), return_exceptions=True)
        assert {type(answer) for answer in answers[:-1]} == {InvalidApiKey}
        assert isinstance(answers[-1], Caller)
        assert database.seconds_since_failure == float("inf")
        assert (len(known._keys._known), len(known._keys._unknown)) == (1, 100)

    asyncio.run(body())
    # The first two queries began at once, and the rest waited to be asked together.
    assert len(asked) <= 10, asked
    assert sum(asked) <= 1_002


def test_a_workspaces_long_questions_hold_up_no_other(engine: Engine) -> None:
    """A workspace's queries have places of their own. One that waits behind them is late, and the database isn't
    blamed."""
    released = threading.Event()

    def long(connection: Connection) -> int:
        released.wait(60)
        return 1

    def short(connection: Connection) -> int:
        return int(connection.execute(text("select 2")).scalar_one())

    async def body() -> None:
        database = Database(engine)
        before = metrics.API_QUESTIONS_LATE._value.get()
        asking = [asyncio.ensure_future(database.ask(long, 1)) for _ in range(20)]
        await asyncio.sleep(0)
        for _ in range(20):
            assert await database.ask_within(60, short, 2) == 2
            assert await database.ask_within(60, short) == 2
        late = asyncio.ensure_future(database.ask_within(0.5, short, 1))
        while not late.done():
            assert await database.ask_within(60, short, 2) == 2
        with pytest.raises(Busy):
            late.result()
        assert metrics.API_QUESTIONS_LATE._value.get() == before + 1
        assert database.seconds_since_failure == float("inf")
        released.set()
        assert await asyncio.gather(*asking) == [1] * 20

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_database_that_answers_nobody_is_blamed(engine: Engine) -> None:
    released = threading.Event()

    async def body() -> None:
        database = Database(engine)
        held = asyncio.ensure_future(database.ask(lambda _: released.wait(60), 1))
        with pytest.raises(UpstreamUnavailable):
            await database.ask_within(0.2, lambda _: released.wait(60), 2)
        assert database.seconds_since_failure < 60
        released.set()
        await held

    asyncio.run(asyncio.wait_for(body(), 60))


def test_places_are_left_for_others() -> None:
    async def body() -> None:
        places = FairSemaphore(4, 3)
        ours = [await places.take(1) for _ in range(3)]
        waiting = [asyncio.ensure_future(places.take(1)) for _ in range(50)]
        theirs = await asyncio.wait_for(places.take(2), 10)
        theirs()
        waiting[0].cancel()
        ours.pop()()
        ours.append(await asyncio.wait_for(waiting[1], 10))
        assert not any(one.done() for one in waiting[2:])
        for one in waiting[2:]:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for give_back in ours:
            give_back()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_reply_in_pieces_begins_when_its_first_is_there(database: str) -> None:
    few = create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(database),
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.1,
    )

    def pieces() -> Iterator[bytes]:
        for number in range(2):
            with few.begin() as connection:
                yield str(connection.execute(text(f"select {number}")).scalar_one()).encode()

    async def body() -> None:
        transfers = Transfers(few, patience_seconds=0.2)
        with few.connect():
            # No refused download keeps its place.
            for _ in range(DOWNLOADS_OF_ONE + 1):
                with pytest.raises(Busy, match="too many database queries"):
                    await transfers.answer(1, pieces)
        assert await _sent(await transfers.answer(1, pieces)) == b"01"
        assert await _sent(await transfers.answer(1, lambda: iter(()))) == b""
        for _ in range(DOWNLOADS_OF_ONE):
            await transfers.answer(1, pieces)
        with pytest.raises(Busy, match="Too many downloads are under way"):
            await transfers.answer(1, pieces)
        assert await _sent(await transfers.answer(2, pieces)) == b"01"
        transfers.close()

    asyncio.run(body())
    few.dispose()


async def _sent(answer: StreamingResponse) -> bytes:
    """Return the body that an answer sends."""
    body = b""

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, anything, send)
    return body


async def anything() -> Message:
    """Wait for ever, as for a client that has nothing more to say."""
    return await asyncio.get_running_loop().create_future()
