"""Redis errors caused by spoiled keys, as opposed to faults of Redis itself, after which no key is repaired."""

import pytest
import redis

from pipeline.infra.redis_keys import is_spoiled

_WHERE = "script: 0a1b, on @user_script:12."


@pytest.mark.parametrize(
    ("error", "spoiled"),
    [
        (redis.ResponseError(f"WRONGTYPE Operation against a key holding the wrong kind of value {_WHERE}"), True),
        (redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), True),
        (redis.ResponseError(f"value is not an integer or out of range {_WHERE}"), True),
        (redis.ResponseError("user_script:12: attempt to compare nil with number"), True),
        (redis.ResponseError(f"MISCONF Redis is configured to save RDB snapshots {_WHERE}"), False),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), False),
        (redis.ResponseError(f"NOREPLICAS Not enough good replicas to write. {_WHERE}"), False),
        (redis.ResponseError("unknown command 'EVALSHA'"), False),
        (redis.exceptions.OutOfMemoryError(f"command not allowed when used memory > 'maxmemory'. {_WHERE}"), False),
        (redis.exceptions.ReadOnlyError("You can't write against a read only replica."), False),
        (redis.TimeoutError("Timeout reading from socket"), False),
        (None, False),
    ],
)
def test_what_is_spoiled(error: BaseException | None, spoiled: bool) -> None:
    assert is_spoiled(error) is spoiled
