"""What a worker believes of a message: the task's id, the job and the chunk. Whoever may write to Redis may write
anything there; what isn't such a message is refused with a line in the log, and never comes to Celery or to a child.

A refused message is lost, as any may be: the dispatcher rings again for what is pending.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import Empty
from typing import Any
from uuid import UUID, uuid4

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import RedisError, ResponseError

from pipeline.publish import IDLE_QUEUE, QUEUE, RUN_CHUNK

log = structlog.get_logger()

#: Ours have a tenth of it.
_MOST_BODY_BYTES = 4_096
_HIGHEST_CHUNK = 2**63 - 1


class _Refused(ValueError):
    """Why a message isn't one of ours."""


def believed(message: Any, queue: str) -> dict[str, Any]:
    """A message of `queue` made anew from what is believed of it.

    Raises:
        ValueError: it isn't a call of our task; what it holds isn't quoted.
    """
    if not isinstance(message, dict) or not isinstance(headers := message.get("headers"), dict):
        raise _Refused("it isn't a task's message")
    if message.get("content-type") != "application/json" or headers.get("compression"):
        raise _Refused("its content isn't plain JSON")
    if headers.get("task") != RUN_CHUNK:
        raise _Refused("it asks for another task")
    task_id = _uuid(headers.get("id"), "task")
    job, chunk = _arguments(message)
    call = [[job, chunk], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return {
        "body": base64.b64encode(json.dumps(call).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {
            "lang": "py",
            "task": RUN_CHUNK,
            "id": task_id,
            "root_id": task_id,
            "argsrepr": f"(job={job}, chunk={chunk})",
            "kwargsrepr": "{}",
        },
        "properties": {
            "body_encoding": "base64",
            "correlation_id": task_id,
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
        },
    }


def _arguments(message: Mapping[str, Any]) -> tuple[str, int]:
    body = message.get("body")
    if not isinstance(body, str) or len(body) > _MOST_BODY_BYTES:
        raise _Refused(f"its body isn't a text of at most {_MOST_BODY_BYTES:,} bytes")
    try:
        arguments, named, more = json.loads(base64.b64decode(body, validate=True))
        job, chunk = arguments
    except (ValueError, TypeError, RecursionError):
        raise _Refused("its body isn't a call with two arguments") from None
    if named or not isinstance(more, dict) or any(more.values()):
        raise _Refused("it asks for more than one call")
    if type(chunk) is not int or not 0 < chunk <= _HIGHEST_CHUNK:
        raise _Refused("its chunk isn't a chunk's id")
    return _uuid(job, "job"), chunk


def _uuid(given: Any, what: str) -> str:
    try:
        return str(UUID(given))
    except (ValueError, TypeError, AttributeError):
        raise _Refused(f"its {what} isn't a UUID") from None


class Channel(redis.Channel):
    """Reads queues, and commands that are broadcast. What can't be read ends here: it would end Celery's worker."""

    def _brpop_read(self, **options: Any) -> Any:
        return self._read(partial(super()._brpop_read, **options))

    def _receive(self) -> Any:
        return self._read(super()._receive)

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._make_anew(self.active_queues)
            return True
        except (Empty, OSError, RedisError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the next message may be a good one
            log.warning("message_refused", reason=f"it can't be read ({type(error).__name__})")
            return True

    def _size(self, queue: str) -> Any:
        try:
            return super()._size(queue)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._make_anew([queue])
            return 0

    def _make_anew(self, queues: Iterable[str]) -> None:
        """Remove what stands where a queue should and is no list, or no message would come any more."""
        with self.conn_or_acquire() as client:
            for queue in queues:
                if client.type(queue) not in (b"list", b"none"):
                    client.delete(queue)
                    log.warning("queue_made_anew", queue=queue)


class Transport(redis.Transport):
    """Celery's own, which hands on no message of a queue of ours but those that are believed."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        if queue.startswith(QUEUE) or queue == IDLE_QUEUE:
            try:
                message = believed(message, queue)
            except _Refused as refused:
                log.warning("message_refused", queue=queue, reason=str(refused))
                return
        super()._deliver(message, queue)


def watch() -> None:
    """Let this process read all its messages by these classes."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{Transport.__name__}"))
