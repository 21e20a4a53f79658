"""Messages: the doorbell that tells workers of a pending chunk. Losing one costs a lap of the dispatcher, no more."""

from collections.abc import Mapping, Sequence
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
#: What the names of models' queues begin with.
QUEUE = "embed."
#: What a worker without models listens to; nobody writes there.
IDLE_QUEUE = "vectormill.idle"


def queue_of(slug: str) -> str:
    """The queue of a model."""
    return QUEUE + slug


def celery_settings(redis_url: str) -> dict[str, Any]:
    """How both ends use Celery. Postgres is the truth: a message may be lost or come twice, and no result is kept."""
    url, tls = _tls(redis_url)
    return {
        "broker_url": url,
        "broker_use_ssl": tls,
        # A worker that dies loses the message; the dispatcher rings again. Late acknowledgement would let a dropped
        # connection run a running chunk twice, and redelivery would loop a text that kills its process.
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
        # Neither a loading model nor a busy machine must get a fresh child killed.
        "worker_pool_start_method": "spawn",
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
            # One list a queue, so that its length is the number of waiting messages.
            "priority_steps": [0],
        },
    }


def _tls(redis_url: str) -> tuple[str, dict[str, Any] | None]:
    """A URL without what it says of TLS, and that as Celery and Flower take it: kombu verifies nothing that it isn't
    told to."""
    parts = urlsplit(verifying(redis_url))
    if parts.scheme != "rediss":
        return redis_url, None
    options: dict[str, Any] = parse_url(parts.geturl())["ssl"]
    left = [(name, value) for name, value in parse_qsl(parts.query) if not name.startswith("ssl_")]
    return parts._replace(query=urlencode(left)).geturl(), options


class Publisher:
    """Rings for chunks and counts what still waits."""

    def __init__(self, redis_url: str) -> None:
        self._celery = Celery("vectormill", set_as_current=False)
        self._celery.conf.update(celery_settings(redis_url))
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=3)

    def waiting(self, slugs: Sequence[str]) -> Mapping[str, int]:
        """Messages waiting in the queues of these models.

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
        """A queue's length as Redis answers."""
        if is_of_another_type(answer):
            make_anew(self._redis, {queue_of(slug): "list"})
            return 0
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    def ring(self, slug: str, job_id: UUID, chunk_id: int, *, first: bool = False) -> None:
        """Tell the model's workers of a pending chunk; `first`: before all that they have been told and not heard yet.

        Raises:
            ServiceUnreachable: Redis doesn't answer.
        """
        try:
            self._celery.send_task(
                RUN_CHUNK,
                args=[str(job_id), chunk_id],
                # Named so, and not declared, it goes by the anonymous exchange, which needs no binding in Redis: a
                # wiped Redis loses no route. With exchange="" Celery would take its default queue.
                queue=queue_of(slug),
                declare=[],
                argsrepr=f"(job={job_id}, chunk={chunk_id})",
                retry=False,
            )
            if first:  # what came last goes to the end that is taken from; if it's gone already, another one does
                self._redis.lmove(queue_of(slug), queue_of(slug), "LEFT", "RIGHT")
        except (OperationalError, redis.RedisError) as error:
            raise ServiceUnreachable("can't reach Redis; check VECTORMILL_REDIS_URL") from error

    def close(self) -> None:
        """Let go of the connections."""
        self._celery.close()
        self._redis.close()
