"""Validation of messages from Redis, since anyone with access to Redis can write anything there.

A task's message may hold its id, the job and the chunk. A broadcast command may inspect the worker, or make it start or
stop listening to a model's queue.

Pure: takes a message, and returns a new one that is rebuilt from the validated parts.
"""

import base64
import json
import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

from pipeline.broker import QUEUE, RUN_CHUNK, ids_shown

#: Limit of a message's body; our own have a tenth of it.
_MOST_BODY_BYTES = 4_096
_HIGHEST_CHUNK = 2**63 - 1
#: Limit of a text that is for Flower alone; our own have half of it.
_MOST_SHOWN = 300
_QUEUE_OF_A_MODEL = re.compile(re.escape(QUEUE) + r"[a-z0-9.-]{1,200}")

_REPLIES = "reply.celery.pidbox"

#: Commands by which a worker follows the catalogue.
_LISTEN = frozenset({"add_consumer", "cancel_consumer"})
#: Commands that change nothing, from Flower and `celery inspect`. Stopping and resizing are left to the supervisor,
#: and revoking to the job's row.
_LOOK = frozenset(
    {
        *("ping", "clock", "stats", "conf", "report", "registered", "active_queues"),
        *("active", "reserved", "scheduled", "revoked", "enable_events", "heartbeat"),
    }
)


class Refused(ValueError):
    """Reason why a message is refused. The message's content isn't quoted."""


def call(message: Any, queue: str) -> dict[str, Any]:
    """Return a task's message of `queue`, rebuilt from its validated parts.

    Raises:
        Refused: it isn't a call of our task.
    """
    headers, content = _headers_of(message), _content_of(message)
    if headers.get("task") != RUN_CHUNK:
        raise Refused("it asks for another task")
    task_id = _uuid(headers.get("id"), "task")
    job, chunk = _arguments(content)
    return _made(
        [[job, chunk], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}],
        queue,
        task_id,
        {
            "lang": "py",
            "task": RUN_CHUNK,
            "id": task_id,
            "root_id": task_id,
            "shadow": _shown(headers.get("shadow")) or None,
            "argsrepr": _shown(headers.get("argsrepr"), ids_shown(job, chunk)),
            "kwargsrepr": "{}",
        },
    )


def command(message: Any, queue: str) -> dict[str, Any]:
    """Return a command from the mailbox `queue`, rebuilt from its validated parts.

    Raises:
        Refused: it isn't a command, or not one that workers carry out.
    """
    asked = _content_of(message)
    if not isinstance(asked, dict) or not isinstance(method := asked.get("method"), str):
        raise Refused("it isn't a command")
    if method not in _LISTEN | _LOOK:
        raise Refused("it is a command that workers don't do")
    arguments = {"queue": _queue_of_a_model(asked.get("arguments"))} if method in _LISTEN else {}
    destination, ticket = asked.get("destination"), asked.get("ticket")
    if destination is not None and not _are_texts(destination):
        raise Refused("its destination isn't a list of names")
    if ticket is not None and not isinstance(ticket, str):
        raise Refused("its ticket isn't a text")
    if asked.get("pattern"):
        raise Refused("its destination is a pattern")
    told = {"destination": destination, "ticket": ticket, "reply_to": _reply_to(asked.get("reply_to"))}
    return _made({"method": method, "arguments": arguments, **told}, queue, str(uuid4()), {})


def _headers_of(message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict) or not isinstance(headers := message.get("headers"), dict):
        raise Refused("it isn't a message of Celery's")
    return headers


def _content_of(message: Any) -> Any:
    """Return the decoded JSON of a message's body."""
    headers = _headers_of(message)
    if message.get("content-type") != "application/json" or headers.get("compression"):
        raise Refused("its content isn't plain JSON")
    body = message.get("body")
    if not isinstance(body, str) or len(body) > _MOST_BODY_BYTES:
        raise Refused(f"its body isn't a text of at most {_MOST_BODY_BYTES:,} bytes")
    try:
        return json.loads(base64.b64decode(body, validate=True))
    except (ValueError, RecursionError):
        raise Refused("its body isn't JSON in base64") from None


def _arguments(content: Any) -> tuple[str, int]:
    try:
        arguments, named, more = content
        job, chunk = arguments
    except (ValueError, TypeError):
        raise Refused("its body isn't a call with two arguments") from None
    if named or not isinstance(more, dict) or any(more.values()):
        raise Refused("it asks for more than one call")
    if type(chunk) is not int or not 0 < chunk <= _HIGHEST_CHUNK:
        raise Refused("its chunk isn't a chunk's id")
    return _uuid(job, "job"), chunk


def _shown(given: Any, end: str = "") -> str:
    """Return a text that is for Flower, if it is one of ours, else only its end."""
    ours = isinstance(given, str) and given.isprintable() and len(given) <= _MOST_SHOWN and given.endswith(end)
    return given if ours else end


def _uuid(given: Any, what: str) -> str:
    try:
        return str(UUID(given))
    except (ValueError, TypeError, AttributeError):
        raise Refused(f"its {what} isn't a UUID") from None


def _queue_of_a_model(arguments: Any) -> str:
    queue = arguments.get("queue") if isinstance(arguments, dict) else None
    if not isinstance(queue, str) or not _QUEUE_OF_A_MODEL.fullmatch(queue):
        raise Refused("its queue isn't a model's")
    return queue


def _reply_to(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    asker = given.get("routing_key") if isinstance(given, dict) else None
    if not isinstance(asker, str) or given.get("exchange") != _REPLIES:
        raise Refused("its reply address isn't Celery's reply exchange")
    return {"exchange": _REPLIES, "routing_key": asker}


def _are_texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, str) for one in given)


def _made(body: Any, queue: str, correlation_id: str, headers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": dict(headers),
        "properties": {
            "body_encoding": "base64",
            "correlation_id": correlation_id,
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
        },
    }
