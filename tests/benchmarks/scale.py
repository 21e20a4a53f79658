"""Jobs of very many chunks: the dispatcher's tick, a status, and a person's commands, against their limits."""

import time
from collections.abc import Callable
from functools import partial
from uuid import UUID

from sqlalchemy import Connection, Engine

from pipeline.broker import Publisher
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.db import chunks
from pipeline.dispatch import dispatcher as dispatch
from pipeline.dispatch import maintenance
from pipeline.dispatch.state import Dispatcher
from pipeline.jobs import control, status
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, servers
from tests.support.jobs_made import WORKER, job_row, make_job, make_model, run_sql

_STATUS_CHUNKS = 250_000
_CONTROL_CHUNKS = 100_000
_ITEMS = 4
_SMALL_JOBS = 5
#: Period of the dispatcher's loop.
_TURN_SECONDS = 0.05

Act = Callable[[Dispatcher, UUID], None]


def _measure(count: int, before: Act, act: Act, limit_ms: float, rounds: Rounds) -> Values:
    """Return the milliseconds of one act on a job of `count` chunks, with a fresh job each round."""
    with servers() as running, connected(running) as place:
        publisher = Publisher(running.redis_url)
        dispatcher = Dispatcher(engine=place.engine, publisher=publisher, lease_seconds=30, text_retention_days=7)
        model = make_model(place.engine)

        def once(_: int) -> float:
            job = _job(place.engine, model, count)
            before(dispatcher, job)
            begin = time.perf_counter()
            act(dispatcher, job)
            taken = time.perf_counter() - begin
            run_sql(place.engine, "delete from vectormill.jobs")
            return taken * 1000

        try:
            return rounds.interleave({"limit": lambda _: limit_ms, "taken": once})
        finally:
            publisher.close()


def _job(engine: Engine, model: Model, count: int) -> UUID:
    """Make a job of `count` pending chunks, among a few small jobs; return its id."""
    for _ in range(_SMALL_JOBS):
        make_job(engine, model, 8)
    job = make_job(engine, model, _ITEMS, per_chunk=_ITEMS)
    run_sql(engine, "delete from vectormill.chunks where job_id = :job", job=job)
    statement = """
        insert into vectormill.chunks (job_id, ordinal, first_index, items, estimated_tokens)
        select :job, n, n * :items, :items, 40 from generate_series(0, :count - 1) n
    """
    run_sql(engine, statement, job=job, count=count, items=_ITEMS)
    total = "update vectormill.jobs set items_total = :total where id = :job"
    run_sql(engine, total, job=job, total=count * _ITEMS)
    run_sql(engine, "analyze vectormill.chunks, vectormill.jobs")
    return job


def _half_done(dispatcher: Dispatcher, job: UUID) -> None:
    statement = """
        update vectormill.chunks set state = 'done', embedded = items, prompt_tokens = 40, finished_at = now()
        where job_id = :job and ordinal % 2 = 0
    """
    run_sql(dispatcher.engine, statement, job=job)
    _tick(dispatcher, job)
    maintenance.snapshot(dispatcher)


def _first_half_done(dispatcher: Dispatcher, job: UUID) -> None:
    """End the first half of the chunks, as workers leave it before the next vacuum or analyze."""
    statement = """
        update vectormill.chunks set state = 'done', embedded = items, prompt_tokens = 40, finished_at = now()
        where job_id = :job and ordinal < :half
    """
    run_sql(dispatcher.engine, statement, job=job, half=_STATUS_CHUNKS // 2)
    _tick(dispatcher, job)


def _tick(dispatcher: Dispatcher, _: UUID) -> None:
    """Do what the dispatcher does four times a second."""
    for duty in (dispatch.publish, maintenance.drain, dispatch.finish):
        duty(dispatcher)


def _find(dispatcher: Dispatcher, job: UUID) -> None:
    with dispatcher.engine.begin() as connection:
        assert len(chunks.pending_after(connection, job, 0, 8)) == 8


def _claim(dispatcher: Dispatcher, job: UUID) -> None:
    """Claim the first pending chunk, searched from the start past all that have ended."""
    with dispatcher.engine.begin() as connection:
        ((chunk, _),) = chunks.pending_after(connection, job, 0, 1)
        assert chunks.claim(connection, job, chunk, worker_id=WORKER, task_id="benchmark", lease_seconds=30)


def _status(dispatcher: Dispatcher, job: UUID) -> None:
    with dispatcher.engine.begin() as connection:
        status.job_status(connection, job)


def _cancel(dispatcher: Dispatcher, job: UUID) -> None:
    """Cancel the job, and tick until it is cancelled."""
    _ask(dispatcher, lambda connection: control.cancel(connection, job))
    while job_row(dispatcher.engine, job)["state"] != JobState.CANCELLED:
        _tick(dispatcher, job)
        time.sleep(_TURN_SECONDS)


def _all_rejected(dispatcher: Dispatcher, job: UUID) -> None:
    """Complete the job, with one reject in each chunk."""
    engine = dispatcher.engine
    run_sql(
        engine,
        "update vectormill.chunks set state = 'done', embedded = items - 1, rejected = 1 where job_id = :job",
        job=job,
    )
    statement = """
        insert into vectormill.rejects (job_id, index, code, message)
        select job_id, first_index, 'encode_failed', 'for a benchmark' from vectormill.chunks where job_id = :job
    """
    run_sql(engine, statement, job=job)
    run_sql(engine, "update vectormill.jobs set state = 'completed', finished_at = now() where id = :job", job=job)
    run_sql(engine, "analyze vectormill.rejects, vectormill.chunks")


def _retry(dispatcher: Dispatcher, job: UUID) -> None:
    _ask(dispatcher, lambda connection: control.retry(connection, job))


def _pause_and_go_on(dispatcher: Dispatcher, job: UUID) -> None:
    _ask(dispatcher, lambda connection: control.pause(connection, job))
    _ask(dispatcher, lambda connection: control.prioritise(connection, job, 5))
    _ask(dispatcher, lambda connection: control.resume(connection, job))


def _ask(dispatcher: Dispatcher, act: Callable[[Connection], object]) -> None:
    with dispatcher.engine.begin() as connection:
        act(connection)


def _benchmark(name: str, count: int, before: Act, act: Act, limit_ms: float) -> Benchmark:
    return Benchmark(name=name, target=1.0, unit="ms", measure=partial(_measure, count, before, act, limit_ms))


BENCHMARKS = (
    _benchmark("pending_250k_chunks", _STATUS_CHUNKS, _first_half_done, _find, 10),
    _benchmark("claim_250k_chunks", _STATUS_CHUNKS, _first_half_done, _claim, 10),
    _benchmark("tick_250k_chunks", _STATUS_CHUNKS, _first_half_done, _tick, 20),
    _benchmark("status_250k_chunks", _STATUS_CHUNKS, _half_done, _status, 50),
    _benchmark("cancel_100k_chunks", _CONTROL_CHUNKS, _tick, _cancel, 2_000),
    _benchmark("retry_100k_chunks", _CONTROL_CHUNKS, _all_rejected, _retry, 2_000),
    _benchmark("pause_resume_100k_chunks", _CONTROL_CHUNKS, _tick, _pause_and_go_on, 2_000),
)
