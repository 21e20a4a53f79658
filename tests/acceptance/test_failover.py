"""Failover to a real streaming standby that misses the primary's last second, while a worker lives: two claims get the
same fence. Without claim tokens the oracle objects."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import psutil
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import Claim
from pipeline.core.errors import LeaseLost
from pipeline.db import chunks
from pipeline.db.database import make_engine
from pipeline.db.migrate import upgrade
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.finalize import due, finalize
from pipeline.doctor.context import Context
from pipeline.doctor.report import State
from pipeline.doctor.servers import settings
from pipeline.embedded.runtime import Running, read_running
from pipeline.infra.settings import Settings
from tests.acceptance import witness
from tests.acceptance.fleet import eventually
from tests.acceptance.oracle import objections
from tests.chaos.successor import Successor
from tests.integration.dispatching import make_dispatcher
from tests.support.jobs_made import DONE, RUNNING, job_row, make_job, make_model, part_of, take, taken
from tests.support.machines import remove_what_root_keeps, running_servers

_ITEMS = 8


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder, "home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Running]:
    try:
        with running_servers(home, _prepare) as started:
            yield started
    finally:
        remove_what_root_keeps(home)


def _prepare(url: str) -> None:
    engine = make_engine(url, application="vectormill-tests")
    with engine.begin() as connection:
        upgrade(connection)
        witness.install(connection)
    engine.dispose()


@pytest.fixture
def engine(server: Running) -> Iterator[Engine]:
    made = make_engine(server.database_url, application="vectormill-tests")
    yield made
    made.dispose()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": f"k{at}"}) + "\n" for at in range(_ITEMS)), encoding="utf-8")
    return file


def _postgres(home: Path) -> psutil.Process:
    def look() -> psutil.Process | None:
        running = read_running(home)
        for mark in running.children if running else ():
            with suppress(psutil.NoSuchProcess):
                if mark.name == "postgres":
                    return psutil.Process(mark.pid)
        return None

    return eventually(look, "a Postgres that runs")


@pytest.mark.parametrize("tokens", [True, False])
def test_a_fence_that_is_given_twice(
    server: Running,
    home: Path,
    engine: Engine,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: bool,
) -> None:
    if not tokens:
        same = chunks.new_token()
        monkeypatch.setattr(chunks, "new_token", lambda: same)
    options = {"output": str(tmp_path / "out"), "columns": {"carry": []}, "dtype": "float32"}
    job = make_job(engine, make_model(engine, f"with-{tokens}"), _ITEMS, per_chunk=_ITEMS, options=options)
    first, second = _claims_over_a_failover(server, home, engine, job)
    assert (first.chunk_id, first.fence) == (second.chunk_id, second.fence)
    assert (first.token != second.token) is tokens
    lives = _commits(engine, first, 0, range(3), done=False)
    assert lives is not tokens
    assert _commits(engine, second, 0, range(_ITEMS), done=True) is tokens
    if lives:
        assert _commits(engine, first, 1, range(3, _ITEMS), done=True)
    _await_completion(engine, server.redis_url, job)
    with engine.begin() as connection:
        said = objections(connection, job, corpus)
    assert bool(said) is not tokens, said


def _claims_over_a_failover(server: Running, home: Path, engine: Engine, job: UUID) -> tuple[Claim, Claim]:
    """Return a claim that only the lost primary knew of, and the next claim of the same chunk."""
    eventually(lambda: _answers(engine), "a server that answers")
    successor = Successor(_postgres(home), server.database_url)
    with successor.standing_by() as line:
        assert "1 standbys, and no commit waits for one" in _warnings(server)
        line.freeze()
        first = taken(engine, job)
        successor.lose_primary()
        line.cut()
        successor.promote()
        successor.take_place()
    engine.dispose()
    eventually(lambda: _answers(engine), "the promoted standby")
    second = take(engine, job)
    assert second, "the standby has seen the first claim"
    return first, second


def _warnings(server: Running) -> str:
    """Return the doctor's warnings about Postgres' settings."""
    context = Context(
        settings=Settings(),
        database_url=server.database_url,
        redis_url=server.redis_url,
        api_url=None,
        flower_url=None,
        flower_password=None,
    )
    try:
        return " ".join(finding.found for finding in settings(context) if finding.state is State.WARN)
    finally:
        context.close()


def _answers(engine: Engine) -> bool:
    try:
        with engine.connect():
            return True
    except DBAPIError:
        return False


def _commits(engine: Engine, claim: Claim, number: int, indexes: range, *, done: bool) -> bool:
    """Write a part; return True if the claim still held."""
    try:
        write_chunk(engine, claim, number, part_of(indexes), DONE if done else RUNNING)
    except LeaseLost:
        return False
    return True


def _await_completion(engine: Engine, redis_url: str, job: UUID) -> None:
    dispatcher = make_dispatcher(engine, redis_url)
    try:

        def ended() -> bool:
            finish(dispatcher)
            with engine.begin() as connection:
                finished = due(connection, 10)
            for each in finished:
                finalize(engine, each)
            return bool(job_row(engine, job)["state"] == "completed")

        eventually(ended, "the job's end")
    finally:
        dispatcher.publisher.close()
