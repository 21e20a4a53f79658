"""Query plans of frequent queries: they find their rows by an index, however many chunks there are."""

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, event, text

from pipeline.db import (
    chunks,
    embeddings,
    events,
    items,
    jobs,
    known_texts,
    lost_claims,
    outputs,
    overview,
    rejects,
    search,
    sql_requests,
    staging,
)
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from tests.conftest import new_database
from tests.support.jobs_made import WORKER, make_job, make_model, run_sql

_CHUNKS = 250_000
_ROWS = 20_000
_JOBS = 3


@pytest.fixture(scope="module")
def big(_big_database: Engine) -> tuple[Engine, list[UUID]]:
    """Make three jobs that share 250,000 chunks: half of them done, some running, the rest pending."""
    engine = _big_database
    model = make_model(engine)
    made = [make_job(engine, model, 4) for _ in range(_JOBS)]
    run_sql(engine, "delete from vectormill.chunks")
    for job in made:
        run_sql(
            engine,
            """
            insert into vectormill.chunks (job_id, ordinal, first_index, items, estimated_tokens, state, lease_until)
            select :job, n, n * 4, 4, 10,
                   case when n % 2 = 0 then 'done' when n % 5001 = 1 then 'running' else 'pending' end,
                   case when n % 2 = 1 and n % 5001 = 1 then now() - interval '1 minute' end
            from generate_series(0, :count - 1) n
            """,
            job=job,
            count=_CHUNKS // _JOBS,
        )
        run_sql(
            engine,
            """
            insert into vectormill.rejects (job_id, index, code, message)
            select :job, n * 4, 'encode_failed', 'for a test' from generate_series(0, 199) n
            """,
            job=job,
        )
    run_sql(
        engine,
        """
        insert into vectormill.jobs (id, workspace_id, name, model_name, vector_space_id, state, finished_at)
        select uuidv7(), workspace_id, name, model_name, vector_space_id, 'completed', now() - n * interval '10 minutes'
        from vectormill.jobs cross join generate_series(1, 2000) n
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.outputs (job_id, chunk_id, fence, part, name, rows, bytes)
        select job_id, id, 1, 0, 'part', 4, 1000 from vectormill.chunks where state = 'done'
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.events (id, workspace_id, type, url, body, state, finished_at)
        select n, 1, 'job.completed', 'https://h' || n % 10 || '/hooks', '{}',
               case when n % 100 = 0 then 'waiting' when n % 100 = 1 then 'given_up' else 'delivered' end,
               case when n % 100 > 0 then now() - n * interval '1 minute' end
        from generate_series(1, 20000) n
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.requests
          (job_id, workspace_id, requested_by, model, text_column, options, payload_sha256, state, finished_at)
        select uuidv7(), 1, 'etl', 'small', 'text', '{}', '', case when n % 1000 = 0 then 'failed' else 'submitted' end,
               now() - interval '30 days'
        from generate_series(1, 10000) n
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.usage (workspace_id, model, created_at)
        select 1, 'small', now() - n * interval '1 minute' from generate_series(1, 20000) n
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.syncs (job_id, collection_id, version_id, is_whole, last_slot, settled_at)
        select uuidv7(), n % 20, n % 20, true, 0, now() from generate_series(1, 20000) n
        """,
    )
    run_sql(
        engine,
        "analyze vectormill.chunks, vectormill.rejects, vectormill.jobs, vectormill.outputs, vectormill.events, "
        "vectormill.requests, vectormill.usage, vectormill.syncs",
    )
    return engine, made


@pytest.fixture(scope="module")
def _big_database(servers: Running) -> Iterator[Engine]:
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests")
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def outdated(servers: Running) -> Iterator[tuple[Engine, UUID, UUID]]:
    """Make a job of 250,000 chunks whose first half has ended since the last analyze, and a small job."""
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests")
        run_sql(engine, "alter table vectormill.chunks set (autovacuum_enabled = false)")
        model = make_model(engine)
        job, small = make_job(engine, model, 4), make_job(engine, model, 8)
        run_sql(
            engine,
            """
            insert into vectormill.chunks (job_id, ordinal, first_index, items, estimated_tokens)
            select :job, n, n * 4, 4, 10 from generate_series(1, :count - 1) n
            """,
            job=job,
            count=_CHUNKS,
        )
        run_sql(engine, "analyze vectormill.chunks, vectormill.jobs")
        half = "update vectormill.chunks set state = 'done' where job_id = :job and ordinal < :half"
        run_sql(engine, half, job=job, half=_CHUNKS // 2)
        yield engine, job, small
        engine.dispose()


@pytest.fixture(scope="module")
def unknown(servers: Running) -> Iterator[tuple[Engine, UUID]]:
    """Make a job that the statistics don't know: they were taken when only another job had rows."""
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests")
        model = make_model(engine)
        _fill(engine, make_job(engine, model, 1))
        for table in _ROWS_OF:
            run_sql(engine, f"analyze vectormill.{table}")
            leaves = "select relid::regclass::text from pg_partition_tree(:table) where isleaf"
            for (leaf,) in run_sql(engine, leaves, table=f"vectormill.{table}"):
                run_sql(engine, f"alter table {leaf} set (autovacuum_enabled = false)")
        job = make_job(engine, model, 1)
        _fill(engine, job)
        yield engine, job
        engine.dispose()


_ROWS_OF = {
    "items": "(job_id, index, carried) select :job, n, '{}' from generate_series(1, :count) n",
    "embeddings": """
        (job_id, index, vector_space_id, tokens, truncated, vector)
        select :job, n, (select vector_space_id from vectormill.jobs where id = :job), 1, false, '[1, 0]'
        from generate_series(1, :count, 2) n
    """,
    "passages": """
        (job_id, index, passage, start, stop, vector_space_id, tokens, truncated, vector)
        select :job, n / 4, n % 4, 0, 1, (select vector_space_id from vectormill.jobs where id = :job), 1, false,
               '[1, 0]' from generate_series(1, :count) n
    """,
    "rejects": """
        (job_id, index, code, message)
        select :job, n, 'encode_failed', 'for a test' from generate_series(2, :count, 4) n
    """,
}


def _fill(engine: Engine, job: UUID) -> None:
    for table, rows in _ROWS_OF.items():
        run_sql(engine, f"insert into vectormill.{table} {rows}", job=job, count=_ROWS)


def plan(connection: Connection, act: Any) -> str:
    """Return the plans of all statements that `act` runs. Their changes are rolled back."""
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if re.match(r"\s*(select|with|update|insert|delete)", statement):
            statements.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    act(connection)
    event.remove(connection, "before_cursor_execute", note)
    connection.rollback()
    found = []
    for statement, parameters in statements:
        rows = connection.exec_driver_sql("explain " + statement, parameters)
        found.append("\n".join(row[0] for row in rows))
    return "\n".join(found)


def _some(engine: Engine, job: UUID, state: str) -> int:
    return int(
        run_sql(engine, "select min(id) from vectormill.chunks where job_id = :job and state = :s", job=job, s=state)[
            0
        ][0]
    )


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("claim", "chunks_open_idx"),
        ("renew", "chunks_pkey"),
        ("pending_after", "chunks_open_idx"),
        ("pending_losses", "chunks_lost_idx"),
        ("has_open", "chunks_open_idx"),
        ("cancel_pending", "chunks_open_idx"),
        ("expire_leases", "chunks_lease_idx"),
        ("tokens_in_flight", "chunks_lease_idx"),
        ("reopen", "chunks_job_id_first_index_key"),
        ("active", "jobs_active_idx"),
        ("without_open_chunks", "chunks_open_idx"),
        ("dead_stagings", "jobs_active_idx"),
        ("take_old_texts", "jobs_texts_idx"),
        ("outputs", "outputs_pkey"),
        ("due_events", "events_due_idx"),
        ("take_event", "events_due_idx"),
        ("events_backlog", "events_ended_idx"),
        ("forget_old_events", "events_ended_idx"),
        ("requests_named", "requests_no_job_idx"),
        ("jobs_named", "jobs_named_idx"),
        ("forget_queries", "requests_queries_idx"),
        ("places", "chunks_pkey"),
        ("waiting", "chunks_open_idx"),
        ("stuck", "chunks_open_idx"),
        ("failures_today", "jobs_ended_idx"),
        ("tokens_of_hour", "usage_workspace_idx"),
        ("freshness", "syncs_settled_idx"),
    ],
)
def test_it_finds_its_rows_by_an_index(big: tuple[Engine, list[UUID]], name: str, index: str) -> None:
    engine, (job, *_) = big
    chunk = _some(engine, job, "pending")

    def claim(connection: Connection) -> Any:
        return chunks.claim(connection, job, chunk, worker_id=WORKER, task_id="t", lease_seconds=30)

    def renew(connection: Connection) -> None:
        taken = claim(connection)
        assert taken
        chunks.renew(connection, taken)

    acts = {
        "claim": claim,
        "renew": renew,
        "pending_after": lambda c: chunks.pending_after(c, job, chunk, 8),
        "pending_losses": lambda c: lost_claims.pending(c, 1_000),
        "has_open": lambda c: chunks.has_open(c, job),
        "cancel_pending": lambda c: chunks.cancel_pending(c, job, chunk, 5_000),
        "expire_leases": lambda c: lost_claims.expire_leases(c, 500),
        "tokens_in_flight": chunks.tokens_in_flight,
        "reopen": lambda c: chunks.reopen(c, job, ["encode_failed"]),
        "active": jobs.active,
        "without_open_chunks": jobs.without_open_chunks,
        "dead_stagings": lambda c: staging.dead(c, 86_400, 10),
        "take_old_texts": lambda c: jobs.take_old_texts(c, 7, 1_000),
        "outputs": lambda c: outputs.of_job(c, job, chunk),
        "due_events": lambda c: events.due(c, 10),
        "take_event": lambda c: events.take(c, "h3", 60),
        "events_backlog": lambda c: events.backlog(c, 3600),
        "forget_old_events": lambda c: events.forget_old(c, 30),
        "requests_named": lambda c: sql_requests.named_with_jobs(c, 1, "docs", 2),
        "jobs_named": lambda c: jobs.named(c, 1, "docs", 2),
        "forget_queries": lambda c: sql_requests.forget_queries(c, 7),
        "places": lambda c: chunks.places(c, [chunk]),
        "waiting": lambda c: overview.waiting(c, None),
        "stuck": lambda c: overview.stuck(c, None, 900),
        "failures_today": lambda c: overview.failures_today(c, None, 6),
        "tokens_of_hour": lambda c: overview.tokens_of_hour(c, None, datetime.now(UTC)),
        "freshness": lambda c: overview.freshness(c, None, 6),
    }
    with engine.connect() as connection:
        found = plan(connection, acts[name])
    assert index in found, found
    if name != "reopen":
        assert not re.search("Seq Scan on (chunks|events|requests|usage|syncs)", found), found


@pytest.mark.parametrize("name", ["pending_after", "has_open", "cancel_pending"])
def test_old_statistics_mislead_nobody(outdated: tuple[Engine, UUID, UUID], name: str) -> None:
    engine, job, _ = outdated
    acts = {
        "pending_after": lambda c: chunks.pending_after(c, job, 0, 8),
        "has_open": lambda c: chunks.has_open(c, job),
        "cancel_pending": lambda c: chunks.cancel_pending(c, job, 0, 5_000),
    }
    with engine.connect() as connection:
        found = plan(connection, acts[name])
    assert "using chunks_open_idx" in found, found
    assert "Seq Scan" not in found, found


def test_a_small_jobs_sums_leave_the_others_alone(outdated: tuple[Engine, UUID, UUID]) -> None:
    engine, _, small = outdated
    with engine.connect() as connection:
        found = plan(connection, lambda c: chunks.sums(c, small))
    assert "chunks_job_id_first_index_key" in found, found


@pytest.mark.parametrize("name", ["results", "passages", "nearest", "rejects", "unsettled"])
def test_a_job_that_statistics_do_not_know_is_read_by_index(unknown: tuple[Engine, UUID], name: str) -> None:
    engine, job = unknown
    acts: dict[str, Any] = {
        "results": lambda c: c.exec_driver_sql(embeddings._READ[False], (job, job, *embeddings.before(0), _ROWS)),
        "passages": lambda c: c.exec_driver_sql(embeddings._READ[True], (job, job, *embeddings.before(0), _ROWS)),
        "nearest": lambda c: search.nearest_items(c, job, [1.0, 0.0], 5),
        "rejects": lambda c: rejects.page_with_carried(c, job, -1, _ROWS),
        "unsettled": lambda c: items.unsettled(c, job, -1, _ROWS),
    }
    with engine.connect() as connection:
        found = plan(connection, acts[name])
    assert "Join Filter" not in found, found  # it would scan all the job's rows for each of them
    assert "SubPlan" in found, found
    assert "Seq Scan" not in found, found


@pytest.mark.parametrize("passages", [False, True])
def test_known_texts_and_their_vectors_are_looked_up_by_index(unknown: tuple[Engine, UUID], passages: bool) -> None:
    engine, job = unknown
    fill = """
        insert into vectormill.known_texts (workspace_id, vector_space_id, hash, job_id, index)
        select workspace_id, vector_space_id, decode(md5(n::text), 'hex'), id, n
        from vectormill.jobs cross join generate_series(1, 200000) n where id = :job on conflict do nothing
    """
    run_sql(engine, fill, job=job)
    run_sql(engine, "analyze vectormill.known_texts")
    hashes = [hashlib.md5(str(n).encode(), usedforsecurity=False).digest() for n in range(500)]
    with engine.connect() as connection:
        look_up = text(known_texts._LOOK_UP[passages])
        found = plan(connection, lambda c: c.execute(look_up, {"job": job, "hashes": hashes}))
        places = ([job] * 500, list(range(500)))
        found += plan(connection, lambda c: c.exec_driver_sql(embeddings._OF_ITEMS[passages], places))
    scanned = re.findall(r"Seq Scan on (?!jobs)\w+ \w+  \((?!cost=0.00..0.00)", found)  # partitions ahead are empty
    assert not scanned, found
