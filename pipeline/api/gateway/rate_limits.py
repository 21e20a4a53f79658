"""Rate limits and caps of a workspace: requests and tokens a minute, in Redis; tokens and cost a month, by usage.

While Redis is away, each api process counts for itself.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from math import ceil

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from pipeline.api.gateway.cache import Caller, GatewayCache
from pipeline.core.errors import InvalidPayload, RateLimited
from pipeline.core.openai_client import CHARACTERS_PER_TOKEN
from pipeline.infra import metrics
from pipeline.infra.redis_keys import is_spoiled

log = structlog.get_logger()

_REDIS_SECONDS = 0.5
#: Pause after a failure of Redis before it is tried again.
_REDIS_REST_SECONDS = 2.0
#: Margin on every wait, since Redis counts time in whole milliseconds.
_MARGIN_SECONDS = 0.005


class Limits:
    """Rate limiter of workspaces. `minute_seconds` is shorter in tests."""

    def __init__(self, redis_url: str, cache: GatewayCache, minute_seconds: int = 60) -> None:
        self._cache, self._minute_seconds = cache, minute_seconds
        self._redis = Redis.from_url(redis_url, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS)
        storage = RedisStorage(
            "async+" + redis_url,
            implementation="redispy",
            wrap_exceptions=True,
            connection_pool=self._redis.connection_pool,  # type: ignore[arg-type] # its hints know no pools
        )
        self._shared = _Counter(storage)
        self._local = _Counter(MemoryStorage())
        self._local_until = 0.0
        #: Workspace → tokens charged but not used, or, below zero, used but not charged: at most one limit either way.
        self._credit: defaultdict[int, float] = defaultdict(float)
        #: Model → its characters per token, learned from its replies.
        self._characters_per_token: dict[str, float] = {}

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def estimated_tokens(self, model: str, longest: int | None, texts: list[str]) -> int:
        """Estimate the tokens that a model reads of texts. `longest`: its limit for one text."""
        size = self._characters_per_token.get(model, CHARACTERS_PER_TOKEN)
        return sum(min(ceil(len(text) / size) + 1, longest or len(text) + 1) for text in texts)

    def learn(self, caller: Caller, model: str, texts: list[str], charged: int, tokens: int) -> None:
        """Compare the tokens charged with those that a request used: the next request pays the difference.

        The model's characters per token are adjusted too.
        """
        if limit := caller.tokens_per_minute:
            self._add_credit(caller, charged - tokens, limit)
        characters = sum(map(len, texts))
        if tokens and characters:
            before = self._characters_per_token.get(model, CHARACTERS_PER_TOKEN)
            self._characters_per_token[model] = max(0.5, 0.9 * before + 0.1 * characters / tokens)

    async def charge(self, caller: Caller, tokens: int) -> dict[str, str]:
        """Charge a request of so many tokens, and return the headers that say what is left of requests and tokens.

        Raises:
            RateLimited: a limit is reached; the error says how long to wait.
            InvalidPayload: the request alone is over the limit.
        """
        await self._check_month(caller)
        headers: dict[str, str] = {}
        if caller.requests_per_minute:
            headers |= await self._hit("requests", caller, caller.requests_per_minute, 1)
        if caller.tokens_per_minute:
            headers |= await self._charge_tokens(caller, caller.tokens_per_minute, tokens)
        return headers

    async def _charge_tokens(self, caller: Caller, limit: int, tokens: int) -> dict[str, str]:
        if tokens > limit:
            raise InvalidPayload(
                f"The request has about {tokens:,} tokens; your workspace's limit is {limit:,} a minute.",
                param="input",
            )
        due = min(limit, max(0, tokens - int(self._credit[caller.workspace_id])))
        # Spend the credit now, and restore it on a refusal: concurrent requests mustn't pay with the same credit.
        self._add_credit(caller, due - tokens, limit)
        try:
            return await self._hit("tokens", caller, limit, due)
        except RateLimited:
            self._add_credit(caller, tokens - due, limit)
            raise

    def _add_credit(self, caller: Caller, tokens: float, limit: int) -> None:
        self._credit[caller.workspace_id] = max(-limit, min(limit, self._credit[caller.workspace_id] + tokens))

    async def _hit(self, what: str, caller: Caller, limit: int, cost: int) -> dict[str, str]:
        item = RateLimitItemPerSecond(limit, self._minute_seconds)
        passed, window = await self._count(item, (what, str(caller.workspace_id)), cost)
        headers = {
            f"x-ratelimit-limit-{what}": str(limit),
            f"x-ratelimit-remaining-{what}": str(window.remaining(limit)),
            f"x-ratelimit-reset-{what}": _span(window.wait_seconds(limit, limit)),
        }
        if not passed:
            error = RateLimited(f"Your workspace's limit of {limit:,} {what} a minute is reached.")
            metrics.API_REFUSALS.labels(f"{what}_per_minute").inc()
            error.retry_after_seconds, error.headers = window.wait_seconds(limit, cost), headers
            raise error
        return headers

    async def _count(self, item: RateLimitItem, names: tuple[str, ...], cost: int) -> "tuple[bool, Window]":
        if time.monotonic() >= self._local_until:
            try:
                return await self._count_shared(item, names, cost)
            except (StorageError, RedisError, OSError, TimeoutError) as error:
                log.warning("redis_unreachable", error=type(error).__name__)
                self._local_until = time.monotonic() + _REDIS_REST_SECONDS
        return await self._local.count(item, names, cost)

    async def _count_shared(self, item: RateLimitItem, names: tuple[str, ...], cost: int) -> "tuple[bool, Window]":
        try:
            return await self._shared.count(item, names, cost)
        except (StorageError, ValueError) as error:
            # The key holds something else than a count: another program has written there.
            if isinstance(error, StorageError) and not is_spoiled(error.storage_error):
                raise
            log.warning("limits_begun_anew", limit=names[0], workspace=names[1])
            await self._shared.reset_window(item, names)
            return await self._shared.count(item, names, cost)

    async def _check_month(self, caller: Caller) -> None:
        if caller.monthly_tokens is None and caller.monthly_cost is None:
            return
        tokens, cost = await self._cache.month(caller.workspace_id)
        if caller.monthly_tokens is not None and tokens >= caller.monthly_tokens:
            limit, reached = "monthly_tokens", f"{caller.monthly_tokens:,} tokens"
        elif caller.monthly_cost is not None and cost >= caller.monthly_cost:
            limit, reached = "monthly_cost", f"a cost of {caller.monthly_cost:,}"
        else:
            return
        metrics.API_REFUSALS.labels(limit).inc()
        raise RateLimited(f"Your workspace's cap of {reached} a month is reached.", retry_after_seconds=3_600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Sliding window counter: the current period's count, and the previous one's, of which a share is still in it."""

    period_seconds: float
    previous: int
    current: int
    #: Time until the current period ends: then its count begins to slide out.
    left_seconds: float

    def remaining(self, limit: int) -> int:
        """Return the cost that still passes now."""
        return max(0, limit - self.current - int(self.previous * self.left_seconds / self.period_seconds))

    def wait_seconds(self, limit: int, cost: int) -> float:
        """Return the seconds until `cost` passes if nothing else comes. For the whole limit: until all is free."""
        room = limit - cost
        if self.current <= room:
            wait = self.left_seconds - self._share(self.previous, room - self.current)
        else:
            wait = self.left_seconds + self.period_seconds - self._share(self.current, room)
        # A request passes only after the moment at which a share has slid out, not at it.
        return max(0.0, wait + _MARGIN_SECONDS)

    def _share(self, count: int, room: int) -> float:
        """Return the seconds for which a sliding count, in whole numbers, is at most `room` before it is gone."""
        return self.period_seconds * (room + 1) / count if count else self.period_seconds


class _Counter:
    """Sliding window counters of the library `limits`, in one storage."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def count(self, item: RateLimitItem, names: tuple[str, ...], cost: int) -> tuple[bool, Window]:
        """Count `cost` if it passes. Return True if it did, and the window after that."""
        passed = await self._limiter.hit(item, *names, cost=cost) if cost else True
        period = item.get_expiry()
        previous, _, current, expires = await self._storage.get_sliding_window(item.key_for(*names), period)
        # A count is kept for one more period after its own.
        left = max(0.0, expires - period)
        return passed, Window(period_seconds=period, previous=previous, current=current, left_seconds=left)

    async def reset_window(self, item: RateLimitItem, names: tuple[str, ...]) -> None:
        """Reset a window."""
        await self._limiter.clear(item, *names)


def _span(seconds: float) -> str:
    """Format a wait as OpenAI does: `12ms`, `1.5s`, `1m3s`. It is rounded up, so that waiting so long is enough."""
    if seconds < 1:
        return f"{ceil(seconds * 1_000)}ms"
    if seconds < 60:
        return f"{ceil(seconds * 100) / 100:g}s"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s"
