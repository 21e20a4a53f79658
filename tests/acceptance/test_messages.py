"""Foreign messages in Redis, where a client may write anything: a worker refuses them, logs that, and goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from pipeline.broker import celery_settings
from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.support.messages_made import MARK, QUEUE, command, head, message, no_calls, no_commands

_BROADCAST = "/1.celery.pidbox"
#: Payloads that can't even be parsed.
_UNREADABLE: dict[str, str | bytes] = {"no JSON": MARK, "no text": b"\xff\xfe\x00", "nested": "[" * 100_000}
#: Headers that have no effect on our workers, though Celery can obey them.
_UNHEEDED = {
    "time limits": head(timelimit=[0.001, 0.001]),
    "later": head(eta="2999-01-01T00:00:00"),
    "never": head(expires="nonsense"),
    "group": head(group=MARK, shadow=MARK, retries="x"),
}


@pytest.fixture
def store(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def celery(redis_url: str) -> Iterator[Celery]:
    """Yield a Celery app like that of an operator or of Flower."""
    with Celery("vectormill", set_as_current=False) as made:
        made.conf.update(celery_settings(redis_url))
        yield made


def _lines(log: Path, event: str) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8").splitlines() if f'"event": "{event}"' in line]


def _told(log: Path, reasons: dict[str, tuple[Any, str]], more: int) -> None:
    """Wait until each of these messages, and `more` others, has a log line of its own."""
    eventually(lambda: len(_lines(log, "message_refused")) >= len(reasons) + more, "a line for each", 20)
    told = "\n".join(_lines(log, "message_refused"))
    assert [name for name, (_, reason) in reasons.items() if reason not in told] == []
    assert len(_lines(log, "message_refused")) == len(reasons) + more
    assert MARK not in log.read_text(encoding="utf-8")


def test_a_worker_refuses_what_isnt_a_message_of_ours(
    fleet: Fleet, store: "redis.Redis", texts: list[str], tmp_path: Path
) -> None:
    corpus, log = write_corpus(tmp_path / "corpus.jsonl", texts[:3_000]), tmp_path / "worker.log"
    fleet.start_dispatcher()
    fleet.start_worker(replicas=2)
    worker = psutil.Process(fleet.processes["worker"].pid)
    first = fleet.submit(str(corpus), "--model", "static")
    fleet.await_end(first)
    children = {child.pid for child in worker.children(recursive=True)}
    bad = no_calls(tmp_path / "unpickled")
    job = fleet.submit(str(corpus), "--model", "static")
    for junk in [*_UNREADABLE.values(), *(json.dumps(junk) for junk, _ in bad.values())]:
        store.rpush(QUEUE, junk)
    for headers in _UNHEEDED.values():
        store.rpush(QUEUE, json.dumps(message(headers=headers)))
    assert fleet.await_end(job)["state"] == "completed"
    eventually(lambda: store.llen(QUEUE) == 0, "an empty queue")

    _told(log, bad, len(_UNREADABLE))
    assert not (tmp_path / "unpickled").exists()
    eventually(lambda: store.hlen("unacked") == 0, "nothing that comes again")
    assert worker.is_running()
    assert {child.pid for child in worker.children(recursive=True)} == children
    assert fleet.scalar("select count(*) from vectormill.claim_losses") == 0
    assert fleet.scalar("select count(*) from vectormill.workers where resting is not null") == 0
    again = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(again)["state"] == "completed"


def test_a_worker_does_no_command_but_ours(
    fleet: Fleet, store: "redis.Redis", celery: Celery, texts: list[str], tmp_path: Path
) -> None:
    corpus, log = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000]), tmp_path / "worker.log"
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    fleet.await_end(fleet.submit(str(corpus), "--model", "static"))
    worker = psutil.Process(fleet.processes["worker"].pid)
    children = {child.pid for child in worker.children(recursive=True)}
    bad = no_commands()
    store.rpush("theirs", json.dumps(message()))
    with store.pipeline(transaction=False) as at_once:
        for junk in ["[" * 100_000, *(json.dumps(junk) for junk, _ in bad.values())]:
            at_once.publish(_BROADCAST, junk)
        at_once.publish(_BROADCAST, json.dumps(command("add_consumer", {"queue": "embed.another"})))
        at_once.execute()

    _told(log, bad, 1)
    (answer,) = celery.control.inspect(timeout=5, limit=1).active_queues().values()
    assert {queue["name"] for queue in answer} == {QUEUE, "embed.minilm", "embed.another", "vectormill.idle"}
    assert celery.control.ping(timeout=5, limit=1)
    assert store.llen("theirs") == 1
    assert {child.pid for child in worker.children(recursive=True)} == children
    again = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(again)["state"] == "completed"


@pytest.mark.parametrize("put", ["set", pytest.param("sadd", marks=pytest.mark.nightly)])
def test_a_queue_that_is_no_list_is_made_anew(
    fleet: Fleet, store: "redis.Redis", texts: list[str], tmp_path: Path, put: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    getattr(store, put)(QUEUE, "junk")
    job = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(job)["state"] == "completed"
    assert fleet.processes["worker"].poll() is None
    assert [name for name in ("dispatcher", "worker") if _lines(tmp_path / f"{name}.log", "queue_made_anew")]


def test_what_celery_notes_is_made_anew_where_others_spoil_it(
    fleet: Fleet, store: "redis.Redis", celery: Celery, texts: list[str], tmp_path: Path
) -> None:
    corpus, log = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000]), tmp_path / "worker.log"
    spoiled = [
        *("unacked", "unacked_index", "_kombu.binding_deadlines"),
        *("_kombu.binding.celery.pidbox", "_kombu.binding.reply.celery.pidbox", f"_kombu.binding_permanent.{QUEUE}"),
    ]
    for key in spoiled:
        store.set(key, "junk")
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    job = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(job)["state"] == "completed"
    told = "\n".join(_lines(log, "queue_made_anew"))
    assert [key for key in spoiled if f'"queue": "{key}"' not in told] == []

    for key in spoiled:
        store.set(key, "junk")
    again = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(again)["state"] == "completed"
    for key in ("unacked", "unacked_index"):
        assert store.type(key) != b"string"
    assert fleet.processes["worker"].poll() is None
