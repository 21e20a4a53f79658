"""Claims, leases and fences on a real Postgres."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, event, text

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import ChunkState, Claim
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.db import chunks, lost_claims
from pipeline.db.chunks import Progress
from tests.support.jobs_made import (
    RUNNING,
    WORKER,
    chunk_ids,
    chunk_rows,
    job_row,
    make_job,
    part_of,
    run_sql,
    take,
    taken,
)

EXPIRED = -1.0


def renew(engine: Engine, claim: Claim) -> JobState | None:
    with engine.begin() as connection:
        return chunks.renew(connection, claim)


def expire(engine: Engine, limit: int = 100) -> list[int]:
    with engine.begin() as connection:
        return lost_claims.expire_leases(connection, limit)


def give_back(engine: Engine, claim: Claim, seconds: float = 0) -> None:
    with engine.begin() as connection:
        assert chunks.record(connection, claim, Progress(state=ChunkState.PENDING, not_before_seconds=seconds))


def test_a_claim_takes_the_chunk_under_a_lease(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id, task="some task")
    row, other = chunk_rows(engine, job_id)
    assert (row["state"], row["fence"], row["worker_id"], row["task_id"]) == ("running", 1, WORKER, "some task")
    assert (row["backend_pid"], claim.fence, claim.items, claim.isolation) == (claim.backend_pid, 1, 4, 0)
    [(left,)] = run_sql(
        engine, "select extract(epoch from lease_until - now()) from vectormill.chunks where id = :id", id=row["id"]
    )
    assert 25 < left <= 30
    assert (other["state"], other["fence"]) == ("pending", 0)
    assert job_row(engine, job_id)["state"] == "running"
    assert take(engine, job_id) is None


def test_one_of_many_concurrent_claims_wins(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    begin = threading.Barrier(6)

    def run(_: int) -> Claim | None:
        begin.wait(120)
        return take(engine, job_id, worker=uuid4())

    with ThreadPoolExecutor(6) as threads:
        claims = [claim for claim in threads.map(run, range(6)) if claim]
    assert [claim.fence for claim in claims] == [1]


def test_only_chunks_of_runnable_jobs_are_claimed(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    for state in set(JobState) - {JobState.QUEUED, JobState.RUNNING}:
        run_sql(engine, "update vectormill.jobs set state = :state", state=state)
        assert take(engine, job_id) is None
    assert chunk_rows(engine, job_id)[0]["fence"] == 0


def test_a_chunk_of_another_job_is_not_claimed(engine: Engine, model: Model) -> None:
    job_id, other = make_job(engine, model), make_job(engine, model)
    with engine.begin() as connection:
        chunk_id = chunk_ids(engine, other)[0]
        assert not chunks.claim(connection, job_id, chunk_id, worker_id=WORKER, task_id="", lease_seconds=30)


def test_a_chunk_given_back_waits_for_its_time(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    give_back(engine, taken(engine, job_id), seconds=60)
    assert chunk_rows(engine, job_id)[0]["worker_id"] is None
    assert take(engine, job_id) is None
    run_sql(engine, "update vectormill.chunks set not_before = now()")
    assert taken(engine, job_id).fence == 2


def test_the_owner_renews(engine: Engine, model: Model) -> None:
    claim = taken(engine, make_job(engine, model), lease_seconds=EXPIRED)
    longer = Claim(**{**{name: getattr(claim, name) for name in Claim.__dataclass_fields__}, "lease_seconds": 60})
    assert renew(engine, longer) is JobState.RUNNING
    assert expire(engine) == []


def test_a_renewal_tells_of_a_cancellation(engine: Engine, model: Model) -> None:
    claim = taken(engine, make_job(engine, model))
    run_sql(engine, "update vectormill.jobs set state = 'cancelling'")
    assert renew(engine, claim) is JobState.CANCELLING


def test_a_swept_chunk_that_nobody_took_is_revived_by_renewal(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id, lease_seconds=EXPIRED)
    assert expire(engine) == [claim.chunk_id]
    assert renew(engine, claim) is JobState.RUNNING
    assert take(engine, job_id) is None


def test_a_revived_claim_is_no_crash(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id, lease_seconds=EXPIRED)
    for _ in range(5):
        assert expire(engine) == [claim.chunk_id]
        assert renew(engine, claim)
    row = chunk_rows(engine, job_id)[0]
    assert (row["crashes"], row["isolation"]) == (0, 0)


def test_another_claim_ends_renewal(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id, lease_seconds=EXPIRED)
    expire(engine)
    assert taken(engine, job_id).fence == 2
    assert renew(engine, claim) is None


def test_what_was_given_back_is_not_renewed(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id)
    give_back(engine, claim)
    assert renew(engine, claim) is None
    assert chunk_rows(engine, job_id)[0]["state"] == "pending"


def test_only_expired_leases_are_swept_and_written_down(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model, 12)
    lost, kept = taken(engine, job_id, 0, lease_seconds=EXPIRED), taken(engine, job_id, 1)
    assert expire(engine) == [lost.chunk_id]
    rows = chunk_rows(engine, job_id)
    assert [row["state"] for row in rows] == ["pending", "running", "pending"]
    assert [(row["crashes"], row["isolation"]) for row in rows] == [(1, 1), (0, 0), (0, 0)]
    assert (rows[0]["lease_until"], rows[0]["last_error"]) == (None, "lease expired")
    lost_claims = run_sql(
        engine, "select model, job_id, chunk_id, fence, worker_id, cause from vectormill.claim_losses"
    )
    assert lost_claims == [("small", job_id, lost.chunk_id, 1, WORKER, "lease expired")]
    assert kept.fence == 1


def test_the_sweep_passes_locked_rows_over(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    locked, other = (taken(engine, job_id, ordinal, lease_seconds=EXPIRED) for ordinal in (0, 1))
    with engine.begin() as connection:
        assert chunks.record(connection, locked, Progress(state=ChunkState.RUNNING))
        assert expire(engine) == [other.chunk_id]


def test_the_sweep_takes_the_longest_expired_first(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id, 0, lease_seconds=EXPIRED)
    older = taken(engine, job_id, 1, lease_seconds=-100)
    assert expire(engine, 1) == [older.chunk_id]


def test_progress_zeroes_the_crashes(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    taken(engine, job_id, lease_seconds=EXPIRED)
    expire(engine)
    claim = taken(engine, job_id)
    assert claim.isolation == 1
    write_chunk(engine, claim, 0, part_of([0]), RUNNING)
    assert chunk_rows(engine, job_id)[0]["crashes"] == 0


@pytest.mark.parametrize(
    ("worker", "task", "freed"), [(WORKER, "mine", True), (uuid4(), "mine", False), (WORKER, "other", False)]
)
def test_a_dead_child_frees_its_own_claim_only(
    engine: Engine, model: Model, worker: UUID, task: str, freed: bool
) -> None:
    job_id = make_job(engine, model)
    claim = taken(engine, job_id, task="mine")
    with engine.begin() as connection:
        assert lost_claims.free_lost_claim(connection, claim.chunk_id, worker, task, "killed") is freed
    row = chunk_rows(engine, job_id)[0]
    wanted = ("pending", 1, 1, "killed") if freed else ("running", 0, 0, None)
    assert (row["state"], row["crashes"], row["isolation"], row["last_error"]) == wanted


def test_only_a_task_that_never_claimed_died_before_its_claim(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    chunk = chunk_rows(engine, job_id)[0]["id"]

    def died(task: str) -> int:
        with engine.begin() as connection:
            lost_claims.note_death_before_claim(connection, chunk, WORKER, task, "died before its claim")
            return connection.execute(
                text("select count(*) from vectormill.claim_losses where fence = 0 and task_id = :task"), {"task": task}
            ).scalar_one()

    assert died("early") == 1
    taken(engine, job_id, task="first", lease_seconds=EXPIRED)
    assert died("other") == 0, "another task runs it"
    expire(engine)
    assert died("first") == 0, "the sweep has counted this loss"
    taken(engine, job_id, task="second", lease_seconds=EXPIRED)
    expire(engine)
    assert died("first") == 0, "though another task had its turn since"
    assert died("third") == 1


def test_deaths_before_a_claim_count_each_and_blame_no_chunk(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    row = chunk_rows(engine, job_id)[0]
    with engine.begin() as connection:
        for task in ("one", "another"):
            lost_claims.note_death_before_claim(connection, row["id"], WORKER, task, "died before its claim")
        assert lost_claims.of_worker(connection, WORKER) == 2
        assert lost_claims.of_models(connection, 600) == {model.name: (2, 2, 0)}
    assert chunk_rows(engine, job_id)[0] == row


def test_a_model_that_stops_over_a_chunk_again_is_a_crash_of_it(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)

    def stop() -> tuple[int, int]:
        claim = taken(engine, job_id)
        with engine.begin() as connection:
            lost_claims.note_stop(connection, claim)
            assert chunks.record(connection, claim, Progress(state=ChunkState.PENDING, isolation=None))
        row = chunk_rows(engine, job_id)[0]
        return row["crashes"], row["isolation"]

    assert stop() == (0, 0), "the device may be at fault"
    assert stop() == (1, 1)
    assert stop() == (2, 2)
    write_chunk(engine, taken(engine, job_id), 0, part_of([0]), RUNNING)
    run_sql(engine, "update vectormill.chunks set state = 'pending', lease_until = null")
    assert stop()[0] == 0, "something was committed since"


def test_what_a_retry_reopened_is_not_the_old_claims_any_more(engine: Engine, model: Model) -> None:
    job_id = make_job(engine, model)
    frozen = taken(engine, job_id, lease_seconds=EXPIRED)
    expire(engine)
    with engine.begin() as connection:
        chunks.cancel_pending(connection, job_id, 0, 10)
        assert chunks.reopen(connection, job_id, []) == 2
    assert renew(engine, frozen) is None
    with engine.begin() as connection:
        assert not chunks.record(connection, frozen, Progress(state=ChunkState.DONE, embedded=4))


@contextmanager
def plans(engine: Engine) -> Iterator[list[str]]:
    """Yield a list that holds, after the block, the plan of each statement that ran in it."""
    seen: list[tuple[str, Any]] = []
    found: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if not statement.startswith("explain"):
            seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        for statement, parameters in seen:
            found.append("\n".join(connection.exec_driver_sql(f"explain {statement}", parameters).scalars()))


@pytest.fixture
def crowded(engine: Engine, model: Model) -> tuple[UUID, int]:
    """Make thousands of chunks of several jobs, most of them done, some running. Return a job and a pending chunk."""
    ids = [make_job(engine, model, 2_000, per_chunk=1) for _ in range(4)]
    run_sql(engine, "update vectormill.chunks set state = 'done' where job_id <> :job or ordinal < 1500", job=ids[-1])
    run_sql(engine, "update vectormill.chunks set state = 'running', lease_until = now() where ordinal % 400 = 1")
    run_sql(engine, "analyze vectormill.chunks")
    run_sql(engine, "analyze vectormill.jobs")
    return ids[-1], chunk_ids(engine, ids[-1])[1_900]


Query = Callable[[Connection, UUID, int], object]


@pytest.mark.parametrize(
    ("index", "query"),
    [
        (
            "chunks_(pkey|open_idx)",
            lambda connection, job_id, chunk_id: chunks.claim(
                connection, job_id, chunk_id, worker_id=WORKER, task_id="", lease_seconds=30
            ),
        ),
        ("chunks_open_idx", lambda connection, job_id, chunk_id: chunks.pending_after(connection, job_id, 0, 4)),
        ("chunks_open_idx", lambda connection, job_id, _: chunks.has_open(connection, job_id)),
        ("chunks_lease_idx", lambda connection, *_: lost_claims.expire_leases(connection, 100)),
        ("chunks_lease_idx", lambda connection, *_: chunks.tokens_in_flight(connection)),
    ],
    ids=["claim", "pending_after", "has_open", "expire_leases", "tokens_in_flight"],
)
def test_hot_queries_use_their_index(engine: Engine, crowded: tuple[UUID, int], index: str, query: Query) -> None:
    with plans(engine) as found, engine.connect() as connection:
        query(connection, *crowded)
    assert len(found) == 1
    assert "Seq Scan on chunks" not in found[0]
    assert re.search(index, found[0])
