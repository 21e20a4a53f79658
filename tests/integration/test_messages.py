"""Worker's transport over Redis. Whole workers that are sent junk are in tests/acceptance/test_messages.py."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from kombu import Connection, Consumer, Exchange, Queue

from pipeline.broker import celery_settings
from tests.support.lines import Line, at_port, line_to
from tests.support.messages_made import QUEUE, command, message
from workers.runner.transport import Transport

_BROADCAST = "/1.celery.pidbox"


def connect(redis_url: str) -> Connection:
    options = celery_settings(redis_url)["broker_transport_options"]
    return Connection(redis_url, transport=Transport, transport_options=options)


@pytest.fixture
def connection(redis_url: str) -> Iterator[Connection]:
    with connect(redis_url) as made:
        yield made


@pytest.fixture
def store(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def consumer(connection: Connection, queue: Queue, take: Callable[[Any, Any], None], **options: Any) -> Consumer:
    return Consumer(connection.default_channel, [queue], callbacks=[take], accept=["json"], **options)


def test_what_goes_wrong_after_reading_isnt_the_messages_fault(connection: Connection, store: "redis.Redis") -> None:
    def fail(_body: Any, _message: Any) -> None:
        raise ValueError("a fault of ours")

    store.lpush(QUEUE, json.dumps(message()))
    with consumer(connection, Queue(QUEUE), fail), pytest.raises(ValueError, match="a fault of ours"):
        connection.drain_events(timeout=120)


def test_a_bad_broadcast_keeps_no_good_one_waiting(connection: Connection, store: "redis.Redis") -> None:
    heard = []
    mailbox = Queue("me.celery.pidbox", Exchange("celery.pidbox", type="fanout"))
    with consumer(connection, mailbox, lambda body, _: heard.append(body["method"]), no_ack=True):
        connection.drain_events(timeout=120)  # the confirmation of its subscription
        for count, junk in enumerate(("[" * 100_000, "no JSON", "{}"), start=1):
            with store.pipeline(transaction=True) as at_once:
                at_once.publish(_BROADCAST, junk)
                at_once.publish(_BROADCAST, json.dumps(command("ping")))
                assert at_once.execute() == [1, 1]
            connection.drain_events(timeout=120)
            assert heard == ["ping"] * count


@pytest.mark.parametrize("key", ["unacked", "unacked_index"])
def test_no_message_is_lost_where_others_spoil_what_celery_notes(
    connection: Connection, store: "redis.Redis", key: str
) -> None:
    def take(_body: Any, taken: Any) -> None:
        assert store.hlen("unacked") == store.zcard("unacked_index") == 1
        store.delete(key)
        store.set(key, "junk")
        taken.ack()
        heard.append(taken)

    heard: list[Any] = []
    store.set(key, "junk")
    store.lpush(QUEUE, json.dumps(message()))
    with consumer(connection, Queue(QUEUE), take):
        connection.drain_events(timeout=120)
    assert len(heard) == 1
    assert not store.exists("unacked", "unacked_index")


def test_a_lost_connection_is_closed_as_often_as_celery_likes(redis_url: str, store: "redis.Redis") -> None:
    """Celery closes the connection twice, the second time when the channel can't reach Redis any more."""
    heard: list[Any] = []
    mailbox = Queue("me.celery.pidbox", Exchange("celery.pidbox", type="fanout"), auto_delete=True)
    store.lpush(QUEUE, json.dumps(message()))
    with line_to("127.0.0.1", urlsplit(redis_url).port or 0, Line) as line:
        connection = connect(at_port(redis_url, line.port))
        consumer(connection, Queue(QUEUE), lambda _, taken: heard.append(taken)).consume()
        Consumer(connection.channel(), [mailbox], no_ack=True).consume()
        while not heard:
            connection.drain_events(timeout=120)
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)  # makes it ask for the next message
        line.cut()
        connection.collect(socket_timeout=1)
        connection.close()
    assert store.hlen("unacked") == 1
