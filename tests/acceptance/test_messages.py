"""Whoever may write to Redis may write anything there: a worker refuses it, says so, and goes on."""

import base64
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import redis

from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually

_MARK = "the text of a document"
_QUEUE = "embed.static"
_TASK = "vectormill.run_chunk"
_MORE: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def message(body: Any = None, properties: Any = None, **fields: Any) -> str:
    """A message as Celery writes it, for a chunk that there isn't; with other parts where that is asked."""
    body = [[str(uuid4()), 1], {}, _MORE] if body is None else body
    packed = body if isinstance(body, str) else base64.b64encode(json.dumps(body).encode()).decode()
    delivery = {"exchange": "", "routing_key": _QUEUE}
    good = {"body_encoding": "base64", "delivery_tag": str(uuid4()), "delivery_info": delivery, "priority": 0}
    whole = {
        "body": packed,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": _TASK, "id": str(uuid4()), "argsrepr": _MARK},
        "properties": good if properties is None else properties,
        **fields,
    }
    return json.dumps({name: part for name, part in whole.items() if part is not ...})


def head(**fields: Any) -> dict[str, Any]:
    return {"lang": "py", "task": _TASK, "id": str(uuid4()), **fields}


class Evil:
    """Would leave a file behind where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def refused(place: Path) -> dict[str, tuple[str | bytes, str]]:
    """Messages, and what the log says of each."""
    pickled = base64.b64encode(pickle.dumps([[Evil(place), 1], {}, _MORE])).decode()
    job = str(uuid4())
    two, plain, text = "two arguments", "plain JSON", "a text of at most"
    return {
        "no JSON": (_MARK, "can't be read"),
        "no text": (b"\xff\xfe\x00", "can't be read"),
        "nested": ("[" * 100_000, "can't be read"),
        "a number": ("7", "isn't a task's message"),
        "a list": ("[1, 2]", "isn't a task's message"),
        "empty": ("{}", "isn't a task's message"),
        "no headers": (message(headers=...), "isn't a task's message"),
        "headers of another type": (message(headers=[_MARK]), "isn't a task's message"),
        "pickle": (message(pickled, **{"content-type": "application/x-python-serialize"}), plain),
        "pickle that says it is JSON": (message(pickled), two),
        "packed": (message(headers=head(compression="application/x-gzip")), plain),
        "another task": (message(headers=head(task="celery.backend_cleanup")), "another task"),
        "a task of a strange type": (message(headers=head(task=[_MARK])), "another task"),
        "no id": (message(headers={"task": _TASK}), "its task isn't a UUID"),
        "an id of a strange type": (message(headers=head(id={"a": 1})), "its task isn't a UUID"),
        "no body": (message(""), two),
        "a body of another type": (json.dumps({**json.loads(message()), "body": 7}), text),
        "body isn't base64": (message("§$%"), two),
        "too large": (message("A" * 2_000_000), text),
        "no arguments": (message([[], {}, _MORE]), two),
        "too many": (message([[job, 1, 2], {}, _MORE]), two),
        "by name": (message([[job, 1], {"chunk_id": 2}, _MORE]), "more than one call"),
        "a call after it": (message([[job, 1], {}, {**_MORE, "chain": [{"task": _TASK}]}]), "more than one call"),
        "job isn't a UUID": (message([[_MARK, 1], {}, _MORE]), "its job isn't a UUID"),
        "chunk isn't a number": (message([[job, "1"], {}, _MORE]), "its chunk isn't"),
        "chunk is a truth": (message([[job, True], {}, _MORE]), "its chunk isn't"),
        "chunk is too high": (message([[job, 2**70], {}, _MORE]), "its chunk isn't"),
    }


#: Celery does as these say, where it is asked; here nobody is.
_UNHEEDED = {
    "time limits": head(timelimit=[0.001, 0.001]),
    "later": head(eta="2999-01-01T00:00:00"),
    "never": head(expires="nonsense"),
    "group": head(group=_MARK, shadow=_MARK, retries="x"),
}


@pytest.fixture
def store(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def _lines(log: Path, event: str) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8").splitlines() if f'"event": "{event}"' in line]


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
    bad = refused(tmp_path / "unpickled")
    job = fleet.submit(str(corpus), "--model", "static")
    for junk, _ in bad.values():
        store.rpush(_QUEUE, junk)
    for headers in _UNHEEDED.values():
        store.rpush(_QUEUE, message(headers=headers))
    assert store.publish("/1.celery.pidbox", "{}") == 1
    assert store.publish("/1.celery.pidbox", "[" * 100_000) == 1
    assert fleet.await_end(job)["state"] == "completed"
    eventually(lambda: store.llen(_QUEUE) == 0, "an empty queue")
    eventually(lambda: len(_lines(log, "message_refused")) >= len(bad) + 2, "a line for each", 20)

    told = "\n".join(_lines(log, "message_refused"))
    assert [name for name, (_, reason) in bad.items() if reason not in told] == []
    assert len(_lines(log, "message_refused")) == len(bad) + 2
    assert _MARK not in log.read_text(encoding="utf-8")
    assert not (tmp_path / "unpickled").exists()
    eventually(lambda: store.hlen("unacked") == 0, "nothing that comes again")
    assert worker.is_running()
    assert {child.pid for child in worker.children(recursive=True)} == children
    assert fleet.scalar("select count(*) from vectormill.claim_losses") == 0
    assert fleet.scalar("select count(*) from vectormill.workers where resting is not null") == 0
    again = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(again)["state"] == "completed"


@pytest.mark.parametrize("put", ["set", "sadd"])
def test_a_queue_that_is_no_list_is_made_anew(
    fleet: Fleet, store: "redis.Redis", texts: list[str], tmp_path: Path, put: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    getattr(store, put)(_QUEUE, "junk")
    job = fleet.submit(str(corpus), "--model", "static")
    assert fleet.await_end(job)["state"] == "completed"
    assert fleet.processes["worker"].poll() is None
    assert [name for name in ("dispatcher", "worker") if _lines(tmp_path / f"{name}.log", "queue_made_anew")]
