"""Celery messages that tell workers of pending chunks. A lost message only costs one lap of the dispatcher."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.utils.url import parse_url

from pipeline.core.errors import ServiceUnreachable
from pipeline.infra.redis_keys import is_of_another_type, make_anew
from pipeline.infra.settings import verifying

RUN_CHUNK = "vectormill.run_chunk"
#: Prefix of the names of models' queues.
QUEUE = "embed."
#: Queue of a worker without models; nothing is ever sent there.
IDLE_QUEUE = "vectormill.idle"
#: Names of tasks that a publisher gives in a day: Flower and workers remember each name that they have ever seen.
_MOST_NAMES = 200
_DAY_SECONDS = 86_400.0
_NAME_CHARACTERS = 60


def queue_of(slug: str) -> str:
    """Return the name of a model's queue."""
    return QUEUE + slug


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMessage:
    """Pending chunk of which workers are told, and what tells people which one it is."""

    job_id: UUID
    chunk_id: int
    job: str
    model: str
    #: Position in its job, from 0, the number of the job's chunks, and that of the chunk's items.
    ordinal: int
    chunks: int
    items: int

    @property
    def arguments(self) -> str:
        """The task's arguments as Flower shows them."""
        label = f"chunk {self.ordinal + 1:,}/{self.chunks:,}, {self.items:,} items, {_short(self.job)}"
        return f"{label} {ids_shown(self.job_id, self.chunk_id)}"


def ids_shown(job_id: UUID | str, chunk_id: int) -> str:
    """Return the end of a task's arguments as Flower shows them, by which its job and chunk are found."""
    return f"(job={job_id}, chunk={chunk_id})"


def _short(name: str) -> str:
    """Return a name for people, on one line and of bounded length."""
    shown = "".join(character if character.isprintable() else " " for character in name)
    return shown if len(shown) <= _NAME_CHARACTERS else shown[: _NAME_CHARACTERS - 1] + "…"


def _word(name: str) -> str:
    """Return a name without what separates words in a search of Flower's, whose links search for a task's name."""
    return re.sub(r'[\s"()\\]+', "-", _short(name))


def celery_settings(redis_url: str) -> dict[str, Any]:
    """Return the Celery settings that publishers and workers share.

    Postgres is the truth: a message may be lost or delivered twice, and no result is kept.
    """
    url, tls = _tls(redis_url)
    return {
        "broker_url": url,
        "broker_use_ssl": tls,
        # A worker that dies loses the message, and the dispatcher sends another. With late acknowledgement, a dropped
        # connection would start a running chunk a second time. With redelivery, a text that kills its process would
        # come back without end.
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "task_ignore_result": True,
        "result_backend": None,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_default_queue": IDLE_QUEUE,
        "task_send_sent_event": True,
        "worker_send_task_events": True,
        # A new child must not be killed because the machine is busy.
        "worker_proc_alive_timeout": 1_800,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_max_retries": None,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "visibility_timeout": 3600,
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
            # One list per queue, so that its length is the number of waiting messages.
            "priority_steps": [0],
        },
    }


def _tls(redis_url: str) -> tuple[str, dict[str, Any] | None]:
    """Split a URL into the URL without its TLS options, and these options in the form that Celery and Flower take.

    They must be explicit: by default kombu verifies nothing.
    """
    parts = urlsplit(verifying(redis_url))
    if parts.scheme != "rediss":
        return redis_url, None
    options: dict[str, Any] = parse_url(parts.geturl())["ssl"]
    left = [(name, value) for name, value in parse_qsl(parts.query) if not name.startswith("ssl_")]
    return parts._replace(query=urlencode(left)).geturl(), options


class Publisher:
    """Publisher of messages to models' queues, which also reads how long these are."""

    def __init__(self, redis_url: str) -> None:
        self._celery = Celery("vectormill", set_as_current=False)
        self._celery.conf.update(celery_settings(redis_url))
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=3)
        #: Names that are given → their last use, by the monotonic clock, the oldest use first.
        self._names: dict[str, float] = {}

    def waiting(self, slugs: Sequence[str]) -> Mapping[str, int]:
        """Return the number of messages that wait in each model's queue.

        Raises:
            ServiceUnreachable: Redis doesn't answer.
        """
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for slug in slugs:
                    pipe.llen(queue_of(slug))
                return dict(zip(slugs, map(self._length, slugs, pipe.execute(raise_on_error=False)), strict=True))
        except redis.RedisError as error:
            raise ServiceUnreachable("can't reach Redis; check VECTORMILL_REDIS_URL") from error

    def _length(self, slug: str, answer: Any) -> int:
        """Return a queue's length from Redis' answer; reset a queue whose key holds another type."""
        if is_of_another_type(answer):
            make_anew(self._redis, {queue_of(slug): "list"})
            return 0
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    def publish(self, slug: str, message: ChunkMessage, *, first: bool = False) -> None:
        """Publish a message for a pending chunk to its model's queue. With `first`, it goes ahead of all others there.

        Raises:
            ServiceUnreachable: Redis doesn't answer.
        """
        name = self._name_of(message)
        try:
            self._celery.send_task(
                # The event that a task was sent shows this name; the header says which task it is.
                name,
                args=[str(message.job_id), message.chunk_id],
                headers={"task": RUN_CHUNK},
                shadow=name,
                # A queue that is named and not declared is reached through the anonymous exchange. It needs no binding
                # in Redis, so a wiped Redis loses no route. With exchange="" Celery would take its default queue.
                queue=queue_of(slug),
                declare=[],
                argsrepr=message.arguments,
                retry=False,
            )
            if first:  # move the newest message to the consumers' end; if it's already taken, another one moves
                self._redis.lmove(queue_of(slug), queue_of(slug), "LEFT", "RIGHT")
        except (OperationalError, redis.RedisError) as error:
            raise ServiceUnreachable("can't reach Redis; check VECTORMILL_REDIS_URL") from error

    def _name_of(self, message: ChunkMessage) -> str:
        """Return the task's name as Flower shows it: whose it is. Past the most names, only the model is told."""
        model, now = _word(message.model), monotonic()
        name = f"{_word(message.job)}:{model}"
        if name not in self._names and len(self._names) >= _MOST_NAMES:
            oldest, used = next(iter(self._names.items()))
            if now - used < _DAY_SECONDS:
                return f"other-jobs:{model}"
            del self._names[oldest]
        self._names.pop(name, None)
        self._names[name] = now
        return name

    def close(self) -> None:
        """Close the connections to the broker."""
        self._celery.close()
        self._redis.close()
