"""Keys of Redis that others have written to: how that shows, and how a queue begins anew."""

from collections.abc import Mapping
from typing import Any

import redis
import structlog

log = structlog.get_logger()


def is_of_another_type(answer: Any) -> bool:
    """Whether Redis answers that a key holds something else than is asked for."""
    return isinstance(answer, redis.ResponseError) and "WRONGTYPE" in str(answer)


def is_spoiled(error: BaseException | None) -> bool:
    """Whether a script failed for what it found. Troubles of Redis' own have a class or a code: MISCONF, NOREPLICAS."""
    if type(error) is not redis.ResponseError:
        return False
    code = str(error).partition(" ")[0]
    return code == "WRONGTYPE" or ("user_script" in str(error) and not code.isupper())


def make_anew(client: "redis.Redis", types: Mapping[str, str]) -> None:
    """Remove what stands under a key of Celery's and isn't of the key's type, or no message would come any more."""
    for key, wanted in types.items():
        found: Any = client.type(key)
        if found not in (wanted.encode(), b"none"):
            client.delete(key)
            log.warning("queue_made_anew", queue=key)
