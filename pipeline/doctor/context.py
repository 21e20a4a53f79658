"""Context of the doctor's checks: a deployment, and the addresses of its parts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

from redis import Redis
from sqlalchemy import Connection, Engine

from pipeline.db.database import make_engine
from pipeline.infra.http import status_of
from pipeline.infra.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

_ANSWER_SECONDS = 5.0


@dataclass(kw_only=True)
class Context:
    """Deployment to check. Unknown addresses are None."""

    settings: Settings
    database_url: str
    redis_url: str
    api_url: str | None
    flower_url: str | None
    flower_password: str | None
    #: This machine's clock, seconds since 1970.
    clock: Callable[[], float] = time.time
    #: Models that get the canary text; none: the local ones that a worker serves.
    canary_models: Sequence[str] = ()
    canary_seconds: float = 60.0
    engine: Engine = field(init=False)
    redis: Redis = field(init=False)

    def __post_init__(self) -> None:
        self.engine = make_engine(self.database_url, application="vectormill-doctor", pool_size=2)
        self.redis = Redis.from_url(
            self.redis_url, socket_timeout=_ANSWER_SECONDS, socket_connect_timeout=_ANSWER_SECONDS
        )

    def ask(self, question: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return a statement's result, read in a transaction of its own."""
        with self.engine.begin() as connection:
            return question(connection, *args, **kwargs)

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()
        self.redis.close()


def answer(url: str, path: str) -> int | None:
    """Return the status that a server answers a GET without credentials with, or None if it doesn't answer."""
    return status_of(url.rstrip("/") + path, seconds=_ANSWER_SECONDS)


def is_loopback(host: str | None) -> bool:
    """Return True if an address is reachable from this machine only; a Unix socket's, which has no host, is."""
    return not host or host in ("localhost", "::1") or host.startswith(("127.", "/"))
