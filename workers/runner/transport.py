"""The transport of messages from Redis, where others may write: what can't be read, or isn't believed, is refused with
a line in the log, and never comes to Celery or to a child; what stands where Celery keeps something else is removed.

A refused message is lost, as any may be: the dispatcher rings again for what is pending.
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
    """What was taken and isn't acknowledged yet, noted in Redis."""

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
        """As Celery's, which closes a lost connection twice: the second time there is no way to Redis any more, and
        asking for one would end the worker. What was taken stays noted there, and is given out again later."""
        if self.channel.connection.client is None:
            self._delivered.clear()
            return None
        return super().restore_unacked(*arguments, **options)


class Channel(redis.Channel):
    """Reads queues, and commands that are broadcast. What can't be read ends here: it would end Celery's worker."""

    QoS = QoS

    def mending(self, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Do something with keys of Celery's; once more if they were of another type, and have been made anew."""
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
        """One, as it is called for each that has come: a bad one mustn't keep those after it waiting."""
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
        """Of a queue that may not be an active one yet."""
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
    """Celery's own, which hands on only what is believed."""

    Channel = Channel
    #: Whether what is read has become a message: errors are Celery's from then on.
    delivering = False

    def _deliver(self, message: Any, queue: str) -> None:
        self.delivering = True
        try:
            message = _believed(message, queue)
        except message_validation.Refused as refused:
            log.warning("message_refused", queue=queue, reason=str(refused))
            return
        super()._deliver(message, queue)


def _believed(message: Any, queue: str) -> Any:
    """A message as it may be handed on. Replies and events are for who asked, and for Flower: they move nothing."""
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
    """Let this process read all its messages by these classes."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{Transport.__name__}"))
