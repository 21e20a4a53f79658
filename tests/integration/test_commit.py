"""Commit of a part of a chunk: a transaction that arrives exactly once, whatever happens to the connection."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import psycopg
import pytest
from sqlalchemy import Connection, Engine, event, text

from pipeline.chunk_io import commit as commit_module
from pipeline.chunk_io import parquet_parts
from pipeline.chunk_io.commit import Commit, Ending, write_chunk
from pipeline.core.chunks import Claim, RejectCode
from pipeline.core.errors import LeaseLost
from pipeline.core.models import Model
from pipeline.db import chunks, embeddings, lost_claims, usage
from pipeline.db.database import is_connection_lost, make_engine
from pipeline.jobs import control
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import (
    DONE,
    PENDING,
    RUNNING,
    WORKER,
    chunk_rows,
    count,
    make_job,
    part_of,
    reject,
    run_sql,
    taken,
    vectors_of,
)


@pytest.fixture
def job_id(engine: Engine, model: Model) -> UUID:
    """Make a job of eight items in two chunks."""
    return make_job(engine, model)


@pytest.fixture
def claim(engine: Engine, job_id: UUID) -> Claim:
    """Claim the job's first chunk."""
    return taken(engine, job_id)


def counts(engine: Engine, job_id: UUID) -> tuple[Any, ...]:
    row = chunk_rows(engine, job_id)[0]
    return tuple(row[name] for name in ("state", "embedded", "rejected", "prompt_tokens"))


def parts_metered(engine: Engine) -> list[tuple[Any, ...]]:
    return run_sql(engine, "select fence, part, items, prompt_tokens from vectormill.usage order by fence, part")


def nothing_is_written(engine: Engine) -> bool:
    return not any(count(engine, table) for table in ("embeddings", "rejects", "usage"))


def test_a_whole_chunk(engine: Engine, job_id: UUID, claim: Claim) -> None:
    write_chunk(engine, claim, 0, part_of([0, 1, 2], [reject(3, RejectCode.TOO_LONG)]), DONE)
    assert counts(engine, job_id) == ("done", 3, 1, 9)
    assert chunk_rows(engine, job_id)[0]["finished_at"]
    assert parts_metered(engine) == [(1, 0, 3, 9)]
    assert run_sql(engine, "select index, key, code, message from vectormill.rejects") == [
        (3, "k3", "too_long", "for a test")
    ]
    rows = run_sql(engine, "select index, key, vector_space_id, tokens, truncated from vectormill.embeddings")
    assert rows == [(index, f"k{index}", claim.vector_space_id, 3, False) for index in range(3)]


def test_a_chunk_in_parts(engine: Engine, job_id: UUID, claim: Claim) -> None:
    write_chunk(engine, claim, 0, part_of([2, 0]), RUNNING)
    assert counts(engine, job_id) == ("running", 2, 0, 6)
    write_chunk(engine, claim, 1, part_of([1, 3]), DONE)
    assert counts(engine, job_id) == ("done", 4, 0, 12)
    assert parts_metered(engine) == [(1, 0, 2, 6), (1, 1, 2, 6)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_come_back_exactly(engine: Engine, model: Model, dtype: str) -> None:
    claim = taken(engine, make_job(engine, model, options={"dtype": dtype}))
    extreme = np.array(
        [[1e-7, -0.0, 6.1e-5, 1], [65504, -65504, 1, 0], [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]], dtype=np.float32
    )
    part = part_of(range(4))
    write_chunk(engine, claim, 0, replace(part, rows=replace(part.rows, vectors=extreme)), DONE)
    with engine.connect() as connection:
        rows = [row for block in embeddings.stream(connection, claim.job_id, 3) for row in block]
    read = np.stack([np.asarray(row[2]) for row in rows])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, extreme.astype(dtype).astype(np.float32))
    column = "half" if dtype == "float16" else "vector"
    assert run_sql(engine, f"select count({column}), count(*) from vectormill.embeddings") == [(4, 4)]


def test_postgres_reads_the_same_numbers(engine: Engine, claim: Claim) -> None:
    write_chunk(engine, claim, 0, part_of([0, 1, 2, 3]), DONE)
    rows = run_sql(engine, "select vector::real[] from vectormill.embeddings order by index")
    np.testing.assert_array_equal(np.array([row[0] for row in rows], np.float32), vectors_of(range(4)))


@contextmanager
def refused(engine: Engine) -> Iterator[None]:
    with pytest.raises(LeaseLost):
        yield
    assert nothing_is_written(engine)


def test_a_stale_fence_is_refused(engine: Engine, job_id: UUID) -> None:
    stale = taken(engine, job_id, lease_seconds=-1)
    with engine.begin() as connection:
        lost_claims.expire_leases(connection, 1)
    assert taken(engine, job_id).fence == 2
    with refused(engine):
        write_chunk(engine, stale, 0, part_of([0, 1, 2, 3]), DONE)
    assert counts(engine, job_id) == ("running", 0, 0, 0)


@pytest.mark.parametrize("state", ["cancelled", "done"])
def test_an_ended_chunk_is_refused(engine: Engine, job_id: UUID, claim: Claim, state: str) -> None:
    run_sql(engine, "update vectormill.chunks set state = :state", state=state)
    with refused(engine):
        write_chunk(engine, claim, 0, part_of([0]), RUNNING)


def test_a_swept_chunk_with_my_fence_is_mine_still(engine: Engine, job_id: UUID) -> None:
    claim = taken(engine, job_id, lease_seconds=-1)
    with engine.begin() as connection:
        lost_claims.expire_leases(connection, 1)
    write_chunk(engine, claim, 0, part_of([0, 1, 2, 3]), DONE)
    assert counts(engine, job_id) == ("done", 4, 0, 12)


def test_a_commit_may_give_the_chunk_back(engine: Engine, job_id: UUID, claim: Claim) -> None:
    write_chunk(engine, claim, 0, part_of([0]), replace(PENDING, not_before_seconds=60, isolation=3, error="why"))
    row = chunk_rows(engine, job_id)[0]
    assert (row["state"], row["worker_id"], row["lease_until"]) == ("pending", None, None)
    assert (row["isolation"], row["last_error"]) == (3, "why")
    assert run_sql(engine, "select not_before > now() from vectormill.chunks where id = :id", id=row["id"]) == [(True,)]


def test_what_is_given_back_while_its_job_is_cancelled_is_cancelled(engine: Engine, job_id: UUID, claim: Claim) -> None:
    with engine.begin() as connection:
        control.cancel(connection, job_id)
    write_chunk(engine, claim, 0, part_of([0], [reject(1)]), PENDING)
    assert counts(engine, job_id) == ("cancelled", 1, 1, 3)
    assert chunk_rows(engine, job_id)[0]["cancelled"] == 2


# A server that has lost its last commits gives the same fence twice


def given_again(engine: Engine, job_id: UUID) -> Claim:
    """Claim the chunk again with the same fence, as from a database that has lost the first claim."""
    forget = "update vectormill.chunks set state = 'pending', fence = fence - 1, token = null, worker_id = null"
    run_sql(engine, f"{forget} where state = 'running'")
    return taken(engine, job_id)


def test_the_same_fence_on_another_timeline_is_another_claim(engine: Engine, job_id: UUID, claim: Claim) -> None:
    again = given_again(engine, job_id)
    assert (again.chunk_id, again.fence, again.worker_id) == (claim.chunk_id, claim.fence, claim.worker_id)
    for ending in (RUNNING, PENDING, DONE):
        with refused(engine):
            write_chunk(engine, claim, 0, part_of([0, 1]), ending)
    with engine.begin() as connection:
        assert chunks.renew(connection, claim) is None
        lost_claims.note_stop(connection, claim)
    assert count(engine, "claim_losses") == 0
    write_chunk(engine, again, 0, part_of([0, 1, 2], [reject(3)]), DONE)
    check_written_once(engine, job_id)


def test_a_part_metered_for_another_claim_is_not_mine(engine: Engine, job_id: UUID, claim: Claim) -> None:
    """A commit whose connection was lost looks only for its own earlier try."""
    again = given_again(engine, job_id)
    write_chunk(engine, again, 0, part_of([0, 1]), RUNNING)
    with engine.begin() as connection:
        assert usage.has_chunk_part(connection, again, 0)
        assert not usage.has_chunk_part(connection, claim, 0)


def test_a_claim_whose_commits_are_lost_does_not_go_on(engine: Engine, job_id: UUID, claim: Claim) -> None:
    """The chunk would be done without the rows of the lost commits."""
    write_chunk(engine, claim, 0, part_of([0, 1]), RUNNING)
    run_sql(engine, "delete from vectormill.embeddings; delete from vectormill.usage")
    run_sql(engine, "update vectormill.chunks set embedded = 0, prompt_tokens = 0, parts = 0 where state = 'running'")
    with refused(engine):
        write_chunk(engine, claim, 1, part_of([2, 3]), DONE)
    assert counts(engine, job_id) == ("running", 0, 0, 0)


def test_a_cancellation_that_the_database_lost_cancels_nothing(engine: Engine, job_id: UUID, claim: Claim) -> None:
    """The worker had learned of the cancellation before, and stops."""
    write_chunk(engine, claim, 0, part_of([0]), PENDING)
    assert counts(engine, job_id) == ("pending", 1, 0, 3)
    assert chunk_rows(engine, job_id)[0]["cancelled"] == 0


def test_parts_of_two_claims_with_one_fence_are_two_files(engine: Engine, job_id: UUID, claim: Claim) -> None:
    names = {parquet_parts.name_of(one, number) for one in (claim, given_again(engine, job_id)) for number in (0, 1)}
    assert len(names) == 4


def test_only_the_backend_that_writes_for_a_claim_is_ended_for_it(engine: Engine, job_id: UUID) -> None:
    """After a failover, the same pid belongs to another backend."""
    with engine.connect() as writing:
        pid = backend_of(writing)
        writing.rollback()
        claim = taken(engine, job_id, lease_seconds=0.1)

        def write_for(claim: Claim) -> None:
            writing.rollback()
            writing.execute(text("select set_config('application_name', :name, true)"), {"name": called(claim)})

        def ended() -> list[int]:
            with engine.begin() as dispatcher:
                return lost_claims.terminate_frozen_backends(dispatcher, 0)

        run_sql(engine, "update vectormill.chunks set backend_pid = :pid where id = :id", pid=pid, id=claim.chunk_id)
        past = "select lease_until < now() - interval '0.1 s' from vectormill.chunks where id = :id"
        write_for(replace(claim, token=uuid4()))
        eventually(lambda: run_sql(engine, past, id=claim.chunk_id) == [(True,)], "the end of the lease")
        assert ended() == []
        write_for(claim)
        assert ended() == [claim.chunk_id]
        writing.invalidate()


def called(claim: Claim) -> str:
    """Return the application name of a backend that writes for a claim."""
    return f"vectormill-worker {claim.token.hex}"


@pytest.mark.parametrize("element", [np.nan, np.inf, -np.inf])
def test_a_bad_vector_writes_nothing(engine: Engine, job_id: UUID, claim: Claim, element: float) -> None:
    part = part_of([0, 1])
    part.rows.vectors[1, 2] = element
    with pytest.raises(ValueError, match="1 vectors are zero or not finite"):
        write_chunk(engine, claim, 0, part, DONE)
    assert nothing_is_written(engine)
    assert counts(engine, job_id)[0] == "running"


def test_vectors_of_another_size_write_nothing(engine: Engine, claim: Claim) -> None:
    part = part_of([0, 1])
    with pytest.raises(ValueError, match="shape"):
        write_chunk(engine, claim, 0, replace(part, rows=replace(part.rows, vectors=vectors_of([0, 1], 5))), DONE)
    assert nothing_is_written(engine)


# Connections that are lost during a commit


def backend_of(connection: Connection) -> int:
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver.info.backend_pid


@pytest.fixture
def kill(database: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that ends a backend, and returns when it is gone."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield lambda pid: _kill(connection, pid)


def _kill(connection: "psycopg.Connection[Any]", pid: int) -> None:
    gone = connection.execute("select pg_terminate_backend(%s, 10000)", (pid,)).fetchone()
    assert gone == (True,)


def check_written_once(engine: Engine, job_id: UUID) -> None:
    assert counts(engine, job_id) == ("done", 3, 1, 9)
    assert parts_metered(engine) == [(1, 0, 3, 9)]
    assert (count(engine, "embeddings"), count(engine, "rejects")) == (3, 1)


@pytest.fixture
def part() -> Commit:
    """Make a part that ends a chunk of four items."""
    return part_of([0, 1, 2], [reject(3)])


@pytest.mark.parametrize("words", ["update vectormill.chunks set\n      state = after", "insert into vectormill.usage"])
def test_a_backend_killed_before_a_statement(
    engine: Engine, job_id: UUID, claim: Claim, part: Commit, kill: Callable[[int], None], words: str
) -> None:
    killed: list[int] = []

    def before(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if not killed and words in statement:
            killed.append(backend_of(connection))
            kill(killed[0])

    event.listen(engine, "before_cursor_execute", before)
    write_chunk(engine, claim, 0, part, DONE)
    assert killed
    check_written_once(engine, job_id)


def test_a_backend_killed_before_the_vectors_are_copied(
    engine: Engine,
    job_id: UUID,
    claim: Claim,
    part: Commit,
    kill: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_rows = embeddings.copy_rows
    killed: list[int] = []

    def kill_and_copy(connection: Connection, *arguments: Any, **options: Any) -> None:
        if not killed:
            killed.append(backend_of(connection))
            kill(killed[0])
        copy_rows(connection, *arguments, **options)

    monkeypatch.setattr(embeddings, "copy_rows", kill_and_copy)
    write_chunk(engine, claim, 0, part, DONE)
    assert killed
    check_written_once(engine, job_id)


def test_a_backend_killed_while_it_waits_for_a_lock(
    engine: Engine, database: str, job_id: UUID, claim: Claim, part: Commit, kill: Callable[[int], None]
) -> None:
    waiting = threading.Event()

    def before(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if "usage" in statement and "insert" in statement:
            waiting.set()

    event.listen(engine, "before_cursor_execute", before)
    with psycopg.connect(database) as blocker:
        blocker.execute("lock table vectormill.usage in exclusive mode")
        thread = threading.Thread(target=write_chunk, args=(engine, claim, 0, part, DONE))
        thread.start()
        assert waiting.wait(120)
        kill(_blocked_by(database, blocker.info.backend_pid))
        blocker.rollback()
        thread.join()
    check_written_once(engine, job_id)


def _blocked_by(database: str, pid: int) -> int:
    """Return the pid of the backend that is blocked by `pid`, once there is one."""
    with psycopg.connect(database, autocommit=True) as connection:
        while True:
            found = connection.execute(
                "select pid from pg_stat_activity where %s = any(pg_blocking_pids(pid))", (pid,)
            ).fetchone()
            if found:
                return int(found[0])


def test_an_answer_to_commit_that_is_lost(
    engine: Engine, job_id: UUID, claim: Claim, part: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_answer(engine, monkeypatch)
    write_chunk(engine, claim, 0, part, DONE)
    check_written_once(engine, job_id)


@pytest.mark.parametrize("ending", [RUNNING, PENDING])
def test_an_answer_that_is_lost_of_a_chunk_that_goes_on(
    engine: Engine, job_id: UUID, claim: Claim, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_answer(engine, monkeypatch)
    write_chunk(engine, claim, 0, part_of([0, 1]), ending)
    assert counts(engine, job_id) == (ending.state, 2, 0, 6)
    assert parts_metered(engine) == [(1, 0, 2, 6)]


def lose_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the connection after the next commit that meters usage has arrived, and before it is answered."""
    state = {"usage": False, "lost": False}

    def before(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        state["usage"] = state["usage"] or "insert into vectormill.usage" in statement

    event.listen(engine, "before_cursor_execute", before)
    commit = engine.dialect.do_commit

    def commit_and_break(connection: Any) -> None:
        commit(connection)
        if state["usage"] and not state["lost"]:
            state["lost"] = True
            connection.driver_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(engine.dialect, "do_commit", commit_and_break)


def test_another_claim_meanwhile_ends_the_repetition(
    engine: Engine, job_id: UUID, claim: Claim, part: Commit, kill: Callable[[int], None]
) -> None:
    killed: list[int] = []

    def before(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if not killed and "insert into vectormill.usage" in statement:
            killed.append(backend_of(connection))
            kill(killed[0])
            run_sql(engine, "update vectormill.chunks set fence = 2, worker_id = :other", other=UUID(int=1))

    event.listen(engine, "before_cursor_execute", before)
    with refused(engine):
        write_chunk(engine, claim, 0, part, DONE)


# Errors that are no lost connection


def raise_in_copy(engine: Engine, sqlstate: str) -> None:
    run_sql(
        engine,
        f"""create function vectormill.fail() returns trigger language plpgsql as
            $$ begin raise exception 'no luck' using errcode = '{sqlstate}'; end $$""",
    )
    run_sql(
        engine,
        "create trigger fail before insert on vectormill.embeddings for each row execute function vectormill.fail()",
    )


@pytest.mark.parametrize("sqlstate", ["53100", "40P01", "23505", "57014"])
def test_an_error_of_the_copy_is_no_lost_connection(
    engine: Engine, claim: Claim, sqlstate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a deadlock, a duplicate row and a timeout are raised at once, as SQLAlchemy's errors."""
    monkeypatch.setattr(commit_module, "_PATIENCE_SECONDS", 0)
    raise_in_copy(engine, sqlstate)
    with pytest.raises(Exception, match="no luck") as caught:
        write_chunk(engine, claim, 0, part_of([0]), DONE)
    assert not is_connection_lost(caught.value)
    assert type(caught.value).__module__ == "sqlalchemy.exc"
    assert nothing_is_written(engine)


def test_the_committing_backend_is_the_one_shown(engine: Engine, database: str, job_id: UUID, claim: Claim) -> None:
    other = make_engine(database, application="vectormill-worker", pool_size=1)
    with other.connect() as connection:
        pid = backend_of(connection)
    write_chunk(other, claim, 0, part_of([0]), RUNNING)
    assert chunk_rows(engine, job_id)[0]["backend_pid"] == pid != claim.backend_pid
    assert claim.worker_id == WORKER
    other.dispose()
