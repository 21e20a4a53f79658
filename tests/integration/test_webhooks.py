"""Webhooks of jobs' ends, sent to a real receiver."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import Engine

from pipeline.broker import Publisher
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import Waiting
from pipeline.core.models import Model
from pipeline.db import events, workspaces
from pipeline.dispatch import completion
from pipeline.dispatch.background import Background, Resources
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.maintenance import drain
from pipeline.dispatch.state import Dispatcher
from pipeline.infra.settings import Settings
from pipeline.jobs import control
from pipeline.webhooks import delivery
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import DONE, count, make_job, part_of, reject, run_sql, taken
from tests.support.receiver import Receiver, receiving

SECRET = "whsec_YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def settings(receiver: Receiver) -> Settings:
    return Settings(webhooks=(f"{receiver.url}/hooks",), webhook_secret=SecretStr(SECRET))


@pytest.fixture
def deliver(engine: Engine, settings: Settings) -> Callable[[], None]:
    """Return a function that runs the dispatcher's background task for all events that are due."""

    def deliver() -> None:
        with engine.begin() as connection:
            due = events.due(connection, 10)
        for host in due:
            delivery.deliver(engine, settings, host)

    return deliver


@pytest.fixture
def end(engine: Engine, redis_url: str) -> Callable[[], None]:
    """Return a function that ends the jobs that are over, as the dispatcher does."""

    def end() -> None:
        publisher = Publisher(redis_url)
        at_work = Dispatcher(engine=engine, publisher=publisher, lease_seconds=30, text_retention_days=7)
        drain(at_work)
        finish(at_work)
        publisher.close()

    return end


def job_for(engine: Engine, model: Model, url: str | None, **columns: Any) -> UUID:
    return make_job(engine, model, per_chunk=8, options={"webhook": url, "columns": {"carry": []}}, **columns)


def done(engine: Engine, model: Model, url: str | None, **columns: Any) -> UUID:
    job_id = job_for(engine, model, url, **columns)
    write_chunk(engine, taken(engine, job_id), 0, part_of(range(7), [reject(7, RejectCode.BAD_VECTOR)]), DONE)
    return job_id


def told(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(body) for _, _, body in receiver.got]


def state(engine: Engine) -> list[tuple[Any, ...]]:
    return run_sql(engine, "select state, tries, answer from vectormill.events order by created_at")


def make_due(engine: Engine) -> None:
    run_sql(engine, "update vectormill.events set next_try_at = now()")


def test_a_completed_job_is_told_of(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    job_id = done(engine, model, f"{receiver.url}/hooks/etl?run=1", name="docs", labels={"team": "search"})
    end()
    assert receiver.got == [], "nothing is sent in the transaction that ends a job"
    deliver()
    ((path, headers, body),) = receiver.got
    event = json.loads(body)
    assert (path, headers["content-type"], headers["webhook-id"]) == (
        "/hooks/etl?run=1",
        "application/json",
        event["id"],
    )
    assert event["id"].startswith("evt_")
    assert abs(event["created_at"] - datetime.now(UTC).timestamp()) < 60
    assert {name: event[name] for name in ("object", "type")} == {"object": "event", "type": "job.completed"}
    assert event["data"] == {
        "id": str(job_id),
        "name": "docs",
        "state": "completed",
        "reason": None,
        "message": None,
        "model": "small",
        "labels": {"team": "search"},
        "items": {
            "in": 8,
            "embedded": 7,
            "reused": 0,
            "unchanged": 0,
            "rejected": 1,
            "cancelled": 0,
            "removed": 0,
            "forgotten": 0,
        },
        "tokens": {"prompt": 21},
    }
    client = OpenAI(api_key="none", webhook_secret=SECRET)
    assert client.webhooks.unwrap(body, headers).id == event["id"]
    assert state(engine) == [("delivered", 1, "answers 204")]
    deliver()
    make_due(engine)
    deliver()
    assert len(receiver.got) == 1


def test_a_job_that_is_retried_is_told_of_again(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    job_id = done(engine, model, f"{receiver.url}/hooks")
    end()
    with engine.begin() as connection:
        control.retry(connection, job_id)
    write_chunk(engine, taken(engine, job_id), 0, part_of([7]), DONE)
    end()
    deliver()
    assert [event["data"]["items"]["embedded"] for event in told(receiver)] == [7, 8]
    assert len({event["id"] for event in told(receiver)}) == 2


def test_failed_and_cancelled_jobs_are_told_of(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    done(engine, model, f"{receiver.url}/hooks", max_rejects=0)
    cancelled = job_for(engine, model, f"{receiver.url}/hooks")
    with engine.begin() as connection:
        control.cancel(connection, cancelled)
    end()
    deliver()
    assert {(event["type"], event["data"]["reason"]) for event in told(receiver)} == {
        ("job.failed", "too_many_rejects"),
        ("job.cancelled", "by_user"),
    }
    assert "text 0" not in str(receiver.got)


def test_a_workspaces_webhook_is_that_of_its_jobs(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    with engine.begin() as connection:
        workspaces.set_webhook(connection, 1, f"{receiver.url}/hooks/default")
    done(engine, model, None)
    end()
    deliver()
    done(engine, model, f"{receiver.url}/hooks/own")
    end()
    deliver()
    assert [path for path, _, _ in receiver.got] == ["/hooks/default", "/hooks/own"]
    with engine.begin() as connection:
        workspaces.set_webhook(connection, 1, None)
    done(engine, model, None)
    end()
    assert count(engine, "events") == 2, "nobody is told"


def test_an_event_is_written_with_what_it_tells_or_not_at_all(
    engine: Engine, model: Model, receiver: Receiver, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = done(engine, model, f"{receiver.url}/hooks")

    def lose(*_: Any, **__: Any) -> None:
        raise RuntimeError("the dispatcher dies here")

    with monkeypatch.context() as patch:
        patch.setattr(completion, "job_ended", lose)
        with pytest.raises(RuntimeError):
            end()
    assert run_sql(engine, "select state from vectormill.jobs where id = :id", id=job_id) == [("running",)]
    end()
    assert count(engine, "events") == 1


def test_a_batch_request_is_told_of_where_its_workspace_says(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    with engine.begin() as connection:
        workspaces.set_webhook(connection, 1, f"{receiver.url}/hooks")
        events.add(connection, 1, "batch.completed", {"id": "batch_1"})
    deliver()
    ((_, headers, body),) = receiver.got
    event = OpenAI(api_key="none", webhook_secret=SECRET).webhooks.unwrap(body, headers)
    assert event.type == "batch.completed"
    assert event.data.id == "batch_1"


def test_a_failed_try_is_repeated_with_the_same_id_and_body(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    receiver.answer = lambda number: (500, 302, 204)[number]
    done(engine, model, f"{receiver.url}/hooks")
    end()
    deliver()
    deliver()
    assert state(engine) == [("waiting", 1, "answers 500")]
    (wait,) = run_sql(engine, "select extract(epoch from next_try_at - now())::float8 from vectormill.events")
    assert 0 < wait[0] <= 5
    make_due(engine)
    deliver()
    assert state(engine) == [("waiting", 2, "answers 302")], "it goes nowhere else"
    make_due(engine)
    deliver()
    assert state(engine) == [("delivered", 3, "answers 204")]
    assert len({(path, headers["webhook-id"], body) for path, headers, body in receiver.got}) == 1


@pytest.mark.parametrize(("status", "tries"), [(410, 0), (500, 10)])
def test_it_is_given_up(
    engine: Engine,
    model: Model,
    receiver: Receiver,
    deliver: Callable[[], None],
    end: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    status: int,
    tries: int,
) -> None:
    receiver.answer = lambda _: status
    done(engine, model, f"{receiver.url}/hooks/token")
    end()
    run_sql(engine, "update vectormill.events set tries = :tries", tries=tries)
    deliver()
    assert state(engine) == [("given_up", tries + 1, f"answers {status}")]
    logged = "".join(capsys.readouterr())  # an earlier command may have sent logs to standard error
    assert "webhook_given_up" in logged
    assert "token" not in logged
    make_due(engine)
    deliver()
    assert len(receiver.got) == 1


def test_nothing_is_sent_where_the_operator_does_not_allow_it_or_unsigned(
    engine: Engine, model: Model, receiver: Receiver, settings: Settings, end: Callable[[], None]
) -> None:
    done(engine, model, f"{receiver.url}/elsewhere")
    done(engine, model, f"{receiver.url}/hooks")
    end()
    unsigned = settings.model_copy(update={"webhook_secret": None})
    for _ in range(2):
        with pytest.raises(Waiting):
            delivery.deliver(engine, unsigned, urlsplit(receiver.url).netloc)
    assert receiver.got == []
    assert {row[0] for row in state(engine)} == {"waiting"}, "an operator may still fix it"
    assert {row[2] for row in state(engine)} == {
        "not allowed by the dispatcher's VECTORMILL_WEBHOOKS",
        "no VECTORMILL_WEBHOOK_SECRET to sign with",
    }


def test_who_takes_long_or_is_away_holds_nothing(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    monkeypatch.setattr(delivery, "_TRY_SECONDS", 1.5)
    resolve, resolved = socket.getaddrinfo, threading.Event()
    never = "http://never.resolved.test"

    def resolver(host: str, *how: Any, **more: Any) -> Any:
        if host in never:
            resolved.wait(60)
        return resolve(host, *how, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done(engine, model, url)
        end()
        run_sql(engine, "update vectormill.events set created_at = now() - interval '1 minute'")
        for other in ("http://127.0.0.1:1", never):
            done(engine, model, other)
            end()
        allowed = Settings(webhooks=(url, "http://127.0.0.1:1", never), webhook_secret=SecretStr(SECRET))
        with engine.begin() as connection:
            due = events.due(connection, 10)
        held: list[int] = []
        dripping = threading.Thread(target=_drip, args=(silent, lambda: held.append(engine.pool.checkedout())))  # type: ignore[attr-defined]
        dripping.start()
        for host in due:
            with pytest.raises(Waiting, match=f"{host} did not respond"):
                delivery.deliver(engine, allowed, host)
    dripping.join()
    resolved.set()
    assert held == [0], "no connection of the database is held meanwhile"
    assert state(engine) == [
        ("waiting", 1, "doesn't answer within 1.5 s"),
        ("waiting", 1, "can't be reached (ConnectError)"),
        ("waiting", 1, "doesn't answer within 1.5 s"),
    ]


def _drip(server: socket.socket, look: Callable[[], None]) -> None:
    """Answer with a byte now and then, without end."""
    connection, _ = server.accept()
    with connection:
        look()
        connection.recv(65_536)
        stop = threading.Event()
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not stop.wait(0.05):
                connection.sendall(b"y")
        except OSError:
            return


def test_a_try_whose_dispatcher_died_is_made_again(
    engine: Engine, model: Model, receiver: Receiver, deliver: Callable[[], None], end: Callable[[], None]
) -> None:
    done(engine, model, f"{receiver.url}/hooks")
    end()
    with engine.begin() as connection:
        (host,) = events.due(connection, 10)
        assert events.take(connection, host, 60)
    with engine.begin() as connection:
        assert events.due(connection, 10) == []
        assert events.take(connection, host, 60) is None, "another dispatcher leaves it alone"
    deliver()
    assert receiver.got == []
    make_due(engine)
    deliver()
    assert state(engine) == [("delivered", 2, "answers 204")]


def test_the_dispatcher_sees_to_it_whoever_else_does_not_answer(
    engine: Engine, model: Model, receiver: Receiver, settings: Settings, end: Callable[[], None]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for url in (*[dead] * 6, *[f"{receiver.url}/hooks"] * 3):
            done(engine, model, url)
            end()
        allowed = settings.model_copy(update={"webhooks": (*settings.webhooks, dead)})
        background = Background(Resources(engine, allowed))
        background.begin()
        receiver.wait_for(3)
        eventually(lambda: state(engine)[6:] == [("delivered", 1, "answers 204")] * 3, "the answers to be kept")
        assert sum(row[1] for row in state(engine)[:6]) == 1, "one try at a time"
    # The silent server is closed, which cuts its try off.
    eventually(lambda: backlog(engine) == {"waiting": 6, "late": 1, "given_up": 0}, "the try that failed")
    done(engine, model, f"{receiver.url}/hooks")
    end()
    background.begin()
    receiver.wait_for(4)
    assert sum(row[1] for row in state(engine)[:6]) == 1, "who doesn't answer rests"


def backlog(engine: Engine) -> dict[str, int]:
    with engine.begin() as connection:
        return dict(events.backlog(connection, 60))


def test_old_events_are_forgotten(engine: Engine, model: Model, receiver: Receiver, end: Callable[[], None]) -> None:
    for _ in range(3):
        done(engine, model, f"{receiver.url}/hooks")
        end()
    run_sql(
        engine,
        "update vectormill.events set state = 'given_up', finished_at = now() - interval '29 days' "
        "where id = (select min(id) from vectormill.events)",
    )
    run_sql(
        engine,
        "update vectormill.events set state = 'delivered', finished_at = now() - interval '31 days' "
        "where id = (select max(id) from vectormill.events)",
    )
    with engine.begin() as connection:
        events.forget_old(connection, 30)
    assert {row[0] for row in state(engine)} == {"given_up", "waiting"}
