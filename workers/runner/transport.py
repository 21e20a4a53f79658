"""Transport of messages from Redis, to which other programs may write. A message that is unreadable or invalid is
refused with a line in the log before Celery or a child sees it. A key of the wrong type is deleted.

A refused message is lost, as any message may be: the dispatcher publishes pending chunks again. Celery's public hooks
come too late for this: see docs/explanation/decisions/0018.
"""

from collections.abc import Callable
from queue import Empty
from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import RedisError, ResponseError

from pipeline.broker import QUEUE
from pipeline.infra.redis_keys import is_of_another_type, make_anew
from workers.runner import message_validation

log = structlog.get_logger()

_MAILBOX = ".celery.pidbox"
_REPLIES = ".reply.celery.pidbox"
_EVENTS = "celeryev."


class QoS(redis.QoS):
    """Messages that were received and aren't acknowledged yet, kept in Redis."""

    def append(self, *arguments: Any) -> Any:
        """As Celery's."""
        return self.channel.mending(super().append, *arguments)

    def ack(self, *arguments: Any) -> Any:
        """As Celery's."""
        return self.channel.mending(super().ack, *arguments)

    def reject(self, *arguments: Any, **options: Any) -> Any:
        """As Celery's."""
        return self.channel.mending(super().reject, *arguments, **options)

    def restore_visible(self, *arguments: Any, **options: Any) -> Any:
        """As Celery's."""
        return self.channel.mending(super().restore_visible, *arguments, **options)

    def restore_unacked(self, *arguments: Any, **options: Any) -> Any:
        """As Celery's, which closes a lost connection twice: the second time the channel has no client any more, and
        asking for one would end the worker. Received messages stay in Redis, and are delivered again later."""
        if self.channel.connection.client is None:
            self._delivered.clear()
            return None
        return super().restore_unacked(*arguments, **options)


class Channel(redis.Channel):
    """Channel of queues and broadcast commands. Unreadable messages end here: they would end Celery's consumer."""

    QoS = QoS

    def mending(self, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of Celery's; if a key has the wrong type, delete it and call once more."""
        try:
            return act(*arguments, **options)
        except ResponseError as error:
            if not is_of_another_type(error):
                raise
            self._make_anew()
            return act(*arguments, **options)

    def _brpop_read(self, **options: Any) -> Any:
        return self._read(super()._brpop_read, **options)

    def _receive_one(self, *arguments: Any) -> Any:
        """Receive one broadcast; a bad one mustn't delay the ones behind it."""
        try:
            return self._read(super()._receive_one, *arguments)
        except Empty:
            return False

    def _read(self, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.connection.delivering = False
        try:
            return read(*arguments, **options)
        except ResponseError as error:
            if self.connection.delivering or not is_of_another_type(error):
                raise
            self._make_anew()
            return True
        except (Empty, OSError, RedisError):
            raise
        except Exception as error:
            if self.connection.delivering:
                raise
            log.warning("message_refused", reason=f"it can't be read ({type(error).__name__})")
            return True

    def _size(self, queue: str) -> Any:
        """Return a queue's length; the queue may not be among the active ones yet."""
        try:
            return super()._size(queue)
        except ResponseError as error:
            if not is_of_another_type(error):
                raise
            self._make_anew(queue)
            return super()._size(queue)

    def _queue_bind(self, *arguments: Any) -> Any:
        return self.mending(super()._queue_bind, *arguments)

    def get_table(self, *arguments: Any) -> Any:
        """As Celery's."""
        return self.mending(super().get_table, *arguments)

    def _refresh_bindings(self, *arguments: Any) -> Any:
        return self.mending(super()._refresh_bindings, *arguments)

    def sweep_bindings(self, *arguments: Any) -> Any:
        """As Celery's."""
        return self.mending(super().sweep_bindings, *arguments)

    def _make_anew(self, *queues: str) -> None:
        types = {self.unacked_key: "hash", self.unacked_index_key: "zset", self.keyprefix_binding_deadlines: "zset"}
        for exchange in self.state.exchanges:
            types |= dict.fromkeys(
                (self.keyprefix_queue % exchange, self.keyprefix_binding_permanent % exchange), "set"
            )
        with self.conn_or_acquire() as client:
            make_anew(client, types | dict.fromkeys((*self.active_queues, *queues), "list"))


class Transport(redis.Transport):
    """Celery's transport, which delivers valid messages only."""

    Channel = Channel
    #: True once the bytes read have become a message: later errors are Celery's own.
    delivering = False

    def _deliver(self, message: Any, queue: str) -> None:
        self.delivering = True
        try:
            message = _validated(message, queue)
        except message_validation.Refused as refused:
            log.warning("message_refused", queue=queue, reason=str(refused))
            return
        super()._deliver(message, queue)


def _validated(message: Any, queue: str) -> Any:
    """Return a validated copy of a message. Replies and events pass: they change nothing in a worker."""
    if queue.startswith(QUEUE):
        return message_validation.call(message, queue)
    if queue.endswith(_REPLIES) or queue.startswith(_EVENTS):
        return message
    return (
        message_validation.command(message, queue)
        if queue.endswith(_MAILBOX)
        else message_validation.call(message, queue)
    )


def watch() -> None:
    """Register these classes as the transport of this process."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{Transport.__name__}"))
