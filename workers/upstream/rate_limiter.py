"""Rate limiter and circuit breaker of a gateway: one account in Redis, which all its senders keep together.

Requests and tokens a minute are each paced by the generic cell rate algorithm: a sender reserves the next free moment
and sleeps until then. Limits are learned: from `x-ratelimit-limit-*` as soon as a reply shows them, and from refusals
(429) by additive increase and multiplicative decrease. What a refusal says to wait, all wait. A breaker lets a dead
endpoint be: five failures without an answer in between, and only a probe now and then goes through.

While Redis is away, each sender paces itself at its share of what was last known.
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
#: How long Redis isn't asked again after it failed.
_REDIS_REST_SECONDS = 2.0
#: A refusal that doesn't say how long to wait.
_UNTOLD_SECONDS = 1.0


def _scripts() -> dict[str, str]:
    """The account's scripts in Lua, by what they do."""
    folder = files(__package__) / "lua"
    account = (folder / "account.lua").read_text("utf-8")
    names = ("reserve", "passed", "refused", "give_back", "held", "failed")
    return {name: account + (folder / f"{name}.lua").read_text("utf-8") for name in names}


@dataclass(frozen=True, slots=True)
class Leave:
    """What a sender may do."""

    #: Whether it may send after `wait_seconds`; else it asks again after them.
    granted: bool
    wait_seconds: float
    #: When it sends, by the clock of the account.
    moment: float = 0.0


@dataclass(slots=True)
class _Share:
    """What one sender may send while the account is out of reach: its part of the last known rates."""

    rates: tuple[float, float] = (0.0, 0.0)
    senders: int = 1
    free: float = 0.0
    held: float = 0.0

    def reserve(self, tokens: int, patience: float) -> Leave:
        """As `RateLimiter.reserve`."""
        now = time.monotonic()
        wait = max(0.0, self.free - now, self.held - now)
        if wait > patience or self.held > now:
            return Leave(granted=False, wait_seconds=wait)
        taken = max((cost / rate for cost, rate in zip((1, tokens), self.rates, strict=True) if rate), default=0.0)
        self.free = max(self.free, now - 1) + taken * self.senders
        return Leave(granted=True, wait_seconds=wait)

    def hold(self, seconds: float) -> None:
        """Send nothing for so long."""
        self.held = max(self.held, time.monotonic() + seconds)


@dataclass(slots=True)
class RateLimiter:
    """One sender's hand on the account of a gateway's model. One thread uses it."""

    client: "redis.Redis"
    upstream: Upstream
    #: Limits are those of a key; another one has an account of its own.
    key: str | None = None
    #: How long a request may take.
    request_seconds: float = 60.0
    #: When the breaker last opened, by the clock of the account, as it was last seen; 0: never.
    opened: float = 0.0
    _sender: str = field(default_factory=lambda: uuid4().hex)
    _share: _Share = field(default_factory=_Share)
    _away_until: float = 0.0
    _scripts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._scripts = {name: self.client.register_script(source) for name, source in _scripts().items()}

    def reserve(self, tokens: int, patience_seconds: float) -> Leave:
        """Ask to send a request of about so many tokens. Nothing is reserved where the wait is longer than patience,
        or of unknown length."""
        found = self._ask("reserve", list, self._sender, tokens, patience_seconds, self.request_seconds)
        if found is None:
            return self._share.reserve(tokens, patience_seconds)
        granted, wait, moment, senders, opened, *rates = found
        self.opened = float(opened)
        self._share.senders = max(1, int(senders))
        self._share.rates = (float(rates[0]), float(rates[1]))
        return Leave(granted=bool(granted), wait_seconds=float(wait), moment=float(moment))

    def give_back(self, leave: Leave) -> None:
        """Nothing is sent on this leave: whatever waits for what comes of it needn't."""
        self._ask("give_back", bool, leave.moment, self.request_seconds)

    def held_seconds(self, *, told: bool = False) -> float:
        """For how long nobody may send, or, `told`, for how long the gateway itself said so."""
        found = self._ask("held", lambda answer: [float(one) for one in answer])
        if found is None:
            return max(0.0, self._share.held - time.monotonic())
        by_gateway, by_breaker, self.opened = found
        return by_gateway if told else max(by_gateway, by_breaker)

    @property
    def most_request_tokens(self) -> float:
        """Tokens of a request by which both limits are used up alike, a second's worth at least; infinite where the
        tokens' limit isn't known."""
        requests, tokens = self._share.rates
        if not tokens:
            return float("inf")
        return tokens / min(1.0, requests or 1.0)

    @property
    def minute_tokens(self) -> float:
        """The tokens of a minute: a request of more is never let through. Infinite where no limit is known."""
        return 60 * self._share.rates[1] or float("inf")

    def passed(self, headers: Mapping[str, str], estimated_tokens: int, tokens: int) -> None:
        """A request was answered; the headers may say what the limits are."""
        self._ask("passed", bool, *self._limits(headers), estimated_tokens, tokens)

    def refused(self, leave: Leave, headers: Mapping[str, str], tokens: int, wait_seconds: float | None) -> bool:
        """A request was one too many (429). Returns whether it was one too large: of more tokens than a minute's."""
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
        """Requests and tokens a minute, as headers say; 0: they don't."""
        requests, tokens = (_number(headers.get(f"x-ratelimit-limit-{what}")) or 0.0 for what in ("requests", "tokens"))
        if not any(self._share.rates):
            self._share.rates = (requests / 60, tokens / 60)
        return requests, tokens

    def failed(self, leave: Leave, wait_seconds: float | None) -> None:
        """A request wasn't answered, or with an error of the gateway's."""
        if self._ask("failed", bool, leave.moment, wait_seconds or 0) is None:
            self._share.hold(wait_seconds or _UNTOLD_SECONDS)

    def _ask(self, script: str, read: Callable[[Any], Answer], *arguments: Any) -> Answer | None:
        """What a script answers; None while Redis is away."""
        if time.monotonic() < self._away_until:
            return None
        # Its name is older than the module's: versions side by side share the account.
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
    """Senders that share this share a gateway's limits. Of the key it is a digest only."""
    whole = "\n".join((upstream.url, upstream.model, key or ""))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def connect(redis_url: str) -> "redis.Redis":
    """A client that doesn't wait long."""
    return redis.Redis.from_url(
        redis_url, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS, decode_responses=True
    )


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if isfinite(number) else None
