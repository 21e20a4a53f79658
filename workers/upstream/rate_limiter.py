"""Rate limiter and circuit breaker of an upstream: one account in Redis, shared by all its senders.

Requests and tokens per minute are each paced by the generic cell rate algorithm: a sender reserves the next free moment
and sleeps until then. Limits are learnt from `x-ratelimit-limit-*` as soon as a reply has them, and from refusals (429)
by additive increase and multiplicative decrease. If a refusal names a wait, all senders observe it. The circuit breaker
spares a dead endpoint: after five failures without an answer in between, only an occasional probe goes through.

While Redis is away, each sender paces itself at its share of the rates that were last known.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from math import isfinite
from typing import Any, TypeVar
from uuid import uuid4

import redis
import structlog

from pipeline.core.models import Upstream
from pipeline.infra.redis_keys import is_spoiled

log = structlog.get_logger()

Answer = TypeVar("Answer")

_REDIS_SECONDS = 0.5
#: Pause after Redis failed, before it is asked again.
_REDIS_REST_SECONDS = 2.0
#: Wait after a refusal that names none.
_UNTOLD_SECONDS = 1.0


def _scripts() -> dict[str, str]:
    """Return the account's Lua scripts by name, each one after the common beginning."""
    folder = files(__package__) / "lua"
    account = (folder / "account.lua").read_text("utf-8")
    names = ("reserve", "passed", "refused", "give_back", "held", "failed")
    return {name: account + (folder / f"{name}.lua").read_text("utf-8") for name in names}


@dataclass(frozen=True, slots=True)
class Leave:
    """Answer to a reservation: a moment to send, or a wait before asking again."""

    #: True: the sender may send after `wait_seconds`. False: it may ask again after them.
    granted: bool
    wait_seconds: float
    #: Time to send, by the account's clock.
    moment: float = 0.0


@dataclass(slots=True)
class _Share:
    """One sender's share of the last known rates, for the time that the account is out of reach."""

    rates: tuple[float, float] = (0.0, 0.0)
    senders: int = 1
    free: float = 0.0
    held: float = 0.0

    def reserve(self, tokens: int, patience: float) -> Leave:
        """Reserve as `RateLimiter.reserve` does."""
        now = time.monotonic()
        wait = max(0.0, self.free - now, self.held - now)
        if wait > patience or self.held > now:
            return Leave(granted=False, wait_seconds=wait)
        taken = max((cost / rate for cost, rate in zip((1, tokens), self.rates, strict=True) if rate), default=0.0)
        self.free = max(self.free, now - 1) + taken * self.senders
        return Leave(granted=True, wait_seconds=wait)

    def hold(self, seconds: float) -> None:
        """Let nothing be sent for this time."""
        self.held = max(self.held, time.monotonic() + seconds)


@dataclass(slots=True)
class RateLimiter:
    """One sender's access to the shared account of an upstream's model. For one thread."""

    client: "redis.Redis"
    upstream: Upstream
    #: Limits belong to a key; each key has its own account.
    key: str | None = None
    #: Time limit of a request.
    request_seconds: float = 60.0
    #: Last known time at which the breaker opened, by the account's clock; 0: never.
    opened: float = 0.0
    _sender: str = field(default_factory=lambda: uuid4().hex)
    _share: _Share = field(default_factory=_Share)
    _away_until: float = 0.0
    _scripts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._scripts = {name: self.client.register_script(source) for name, source in _scripts().items()}

    def reserve(self, tokens: int, patience_seconds: float) -> Leave:
        """Reserve the sending of a request of about this many tokens. Nothing is reserved if the wait is longer than
        `patience_seconds`, or of unknown length."""
        found = self._ask("reserve", list, self._sender, tokens, patience_seconds, self.request_seconds)
        if found is None:
            return self._share.reserve(tokens, patience_seconds)
        granted, wait, moment, senders, opened, *rates = found
        self.opened = float(opened)
        self._share.senders = max(1, int(senders))
        self._share.rates = (float(rates[0]), float(rates[1]))
        return Leave(granted=bool(granted), wait_seconds=float(wait), moment=float(moment))

    def give_back(self, leave: Leave) -> None:
        """Give back an unused leave. If it was the breaker's probe, other senders stop waiting for its outcome."""
        self._ask("give_back", bool, leave.moment, self.request_seconds)

    def held_seconds(self, *, told: bool = False) -> float:
        """Return for how long nobody may send; with `told`, only for as long as the upstream itself asked."""
        found = self._ask("held", lambda answer: [float(one) for one in answer])
        if found is None:
            return max(0.0, self._share.held - time.monotonic())
        by_gateway, by_breaker, self.opened = found
        return by_gateway if told else max(by_gateway, by_breaker)

    @property
    def most_request_tokens(self) -> float:
        """Size of a request, in tokens, at which both limits are used up alike; a second's worth at least. Infinite if
        the token limit isn't known."""
        requests, tokens = self._share.rates
        if not tokens:
            return float("inf")
        return tokens / min(1.0, requests or 1.0)

    @property
    def minute_tokens(self) -> float:
        """Tokens per minute; a larger request is never let through. Infinite if no limit is known."""
        return 60 * self._share.rates[1] or float("inf")

    def passed(self, headers: Mapping[str, str], estimated_tokens: int, tokens: int) -> None:
        """Record an answered request, and learn the limits if its headers have them."""
        self._ask("passed", bool, *self._limits(headers), estimated_tokens, tokens)

    def refused(self, leave: Leave, headers: Mapping[str, str], tokens: int, wait_seconds: float | None) -> bool:
        """Record a refusal by limits (429). Return True if the request has more tokens than a minute's limit."""
        wait = _UNTOLD_SECONDS if wait_seconds is None else wait_seconds
        left = [_number(headers.get(f"x-ratelimit-remaining-{what}")) for what in ("requests", "tokens")]
        short = [have is not None and have < cost for have, cost in zip(left, (1, tokens), strict=True)]
        if not any(short):
            short = [True, True]
        limits = self._limits(headers)
        if self._ask("refused", bool, leave.moment, wait, *map(int, short), *limits, tokens) is None:
            self._share.hold(wait)
        return 0 < limits[1] < tokens

    def _limits(self, headers: Mapping[str, str]) -> tuple[float, float]:
        """Return the limits of requests and tokens per minute that headers have; 0 for none."""
        requests, tokens = (_number(headers.get(f"x-ratelimit-limit-{what}")) or 0.0 for what in ("requests", "tokens"))
        if not any(self._share.rates):
            self._share.rates = (requests / 60, tokens / 60)
        return requests, tokens

    def failed(self, leave: Leave, wait_seconds: float | None) -> None:
        """Record a request that got no answer, or an error of the upstream's own."""
        if self._ask("failed", bool, leave.moment, wait_seconds or 0) is None:
            self._share.hold(wait_seconds or _UNTOLD_SECONDS)

    def _ask(self, script: str, read: Callable[[Any], Answer], *arguments: Any) -> Answer | None:
        """Run a script and return its answer; None while Redis is away."""
        if time.monotonic() < self._away_until:
            return None
        # The key keeps the module's former name, so that versions that run side by side share the account.
        key = f"vectormill:throttle:{account_of(self.upstream, self.key)}"
        run = partial(self._scripts[script], keys=[key, f"{key}:senders"], args=list(arguments), client=self.client)
        try:
            try:
                return read(run())
            except redis.ResponseError as error:
                if not is_spoiled(error):
                    raise
                log.warning("limits_begun_anew", gateway=self.upstream.url)
                self.client.delete(key, f"{key}:senders")
                return read(run())
        except redis.RedisError as error:
            log.warning("redis_unreachable", error=type(error).__name__)
            self._away_until = time.monotonic() + _REDIS_REST_SECONDS
            return None


def account_of(upstream: Upstream, key: str | None) -> str:
    """Return the account's name. Senders with the same name share limits; the key enters it only as a digest."""
    whole = "\n".join((upstream.url, upstream.model, key or ""))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def connect(redis_url: str) -> "redis.Redis":
    """Return a Redis client with short timeouts."""
    return redis.Redis.from_url(
        redis_url, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS, decode_responses=True
    )


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if isfinite(number) else None
