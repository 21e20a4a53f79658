"""Detection and repair of Redis keys that hold the wrong type because another program has written to them."""

from collections.abc import Mapping
from typing import Any

import redis
import structlog

log = structlog.get_logger()


def is_of_another_type(answer: Any) -> bool:
    """Return True if Redis answers that a key holds another type than the command needs."""
    return isinstance(answer, redis.ResponseError) and "WRONGTYPE" in str(answer)


def is_spoiled(error: BaseException | None) -> bool:
    """Return True if a script failed because of the data that it found.

    Faults of Redis itself have an exception class or a code of their own, such as MISCONF or NOREPLICAS.
    """
    if type(error) is not redis.ResponseError:
        return False
    code = str(error).partition(" ")[0]
    return code == "WRONGTYPE" or ("user_script" in str(error) and not code.isupper())


def make_anew(client: "redis.Redis", types: Mapping[str, str]) -> None:
    """Delete those of Celery's keys that hold another type than `types` says: no message would arrive otherwise."""
    for key, wanted in types.items():
        found: Any = client.type(key)
        if found not in (wanted.encode(), b"none"):
            client.delete(key)
            log.warning("queue_made_anew", queue=key)
