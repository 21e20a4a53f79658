"""What a workspace may ask for: requests and tokens a minute, counted in Redis; tokens and cost a month, by usage.

While Redis is away each api process counts for itself.
"""

import time
from collections import defaultdict
from math import ceil

import structlog
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import RateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from redis.exceptions import RedisError

from pipeline.api.directory import Caller, Directory
from pipeline.errors import InvalidPayload, RateLimited

log = structlog.get_logger()

_REDIS_SECONDS = 0.5
#: How long Redis isn't asked again after it failed.
_REDIS_REST_SECONDS = 2.0
_MINUTE_SECONDS = 60.0
_CHARACTERS_PER_TOKEN = 4.0


class Limits:
    """Counts what workspaces ask for."""

    def __init__(self, redis_url: str, directory: Directory) -> None:
        self._directory = directory
        storage = RedisStorage(
            "async+" + redis_url,
            implementation="redispy",
            wrap_exceptions=True,
            socket_timeout=_REDIS_SECONDS,
            socket_connect_timeout=_REDIS_SECONDS,
        )
        self._shared: RateLimiter = SlidingWindowCounterRateLimiter(storage)
        self._local: RateLimiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._local_until = 0.0
        #: Tokens that a workspace was charged for and didn't take, or took uncharged.
        self._credit: defaultdict[int, float] = defaultdict(float)
        #: Of each model, learned from its replies.
        self._characters_per_token: dict[str, float] = {}

    def estimated_tokens(self, model: str, longest: int | None, texts: list[str]) -> int:
        """About how many tokens a model reads of texts."""
        size = self._characters_per_token.get(model, _CHARACTERS_PER_TOKEN)
        return sum(min(ceil(len(text) / size) + 1, longest or len(text) + 1) for text in texts)

    def learn(self, caller: Caller, model: str, texts: list[str], charged: int, tokens: int) -> None:
        """Compare what was charged with what a request took; the next one pays the difference."""
        if caller.tokens_per_minute:
            self._credit[caller.workspace_id] += charged - tokens
        characters = sum(map(len, texts))
        if tokens and characters:
            before = self._characters_per_token.get(model, _CHARACTERS_PER_TOKEN)
            self._characters_per_token[model] = max(0.5, 0.9 * before + 0.1 * characters / tokens)

    async def charge(self, caller: Caller, tokens: int) -> dict[str, str]:
        """Count a request of so many tokens. Returns the headers that say what is left.

        Raises:
            RateLimited: a limit is reached; the error says how long to wait.
            InvalidPayload: the request alone is over the limit.
        """
        await self._check_month(caller)
        headers: dict[str, str] = {}
        if caller.requests_per_minute:
            headers |= await self._hit("requests", caller, caller.requests_per_minute, 1)
        if caller.tokens_per_minute:
            if tokens > caller.tokens_per_minute:
                raise InvalidPayload(
                    f"The request has about {tokens:,} tokens; your workspace's limit is "
                    f"{caller.tokens_per_minute:,} a minute.",
                    param="input",
                )
            credit = self._credit[caller.workspace_id]
            due = max(0, tokens - int(credit))
            headers |= await self._hit("tokens", caller, caller.tokens_per_minute, min(due, caller.tokens_per_minute))
            self._credit[caller.workspace_id] -= tokens - due
        return headers

    async def _hit(self, what: str, caller: Caller, limit: int, cost: int) -> dict[str, str]:
        item = RateLimitItemPerMinute(limit)
        names = (what, str(caller.workspace_id))
        passed, remaining, reset_seconds = await self._count(item, names, cost)
        headers = {
            f"x-ratelimit-limit-{what}": str(limit),
            f"x-ratelimit-remaining-{what}": str(remaining),
            f"x-ratelimit-reset-{what}": _span(reset_seconds),
        }
        if not passed:
            # A sliding window frees evenly what was used evenly.
            wait = max(0.05, (cost - remaining) / limit * _MINUTE_SECONDS)
            error = RateLimited(f"Your workspace's limit of {limit:,} {what} a minute is reached.")
            error.retry_after_seconds, error.headers = wait, headers
            raise error
        return headers

    async def _count(self, item: RateLimitItem, names: tuple[str, ...], cost: int) -> tuple[bool, int, float]:
        if time.monotonic() >= self._local_until:
            try:
                return await _count_in(self._shared, item, names, cost)
            except (StorageError, RedisError, OSError, TimeoutError) as error:
                log.warning("redis_unreachable", error=type(error).__name__)
                self._local_until = time.monotonic() + _REDIS_REST_SECONDS
        return await _count_in(self._local, item, names, cost)

    async def _check_month(self, caller: Caller) -> None:
        if caller.monthly_tokens is None and caller.monthly_cost is None:
            return
        tokens, cost = await self._directory.month(caller.workspace_id)
        if caller.monthly_tokens is not None and tokens >= caller.monthly_tokens:
            reached = f"{caller.monthly_tokens:,} tokens"
        elif caller.monthly_cost is not None and cost >= caller.monthly_cost:
            reached = f"a cost of {caller.monthly_cost:,}"
        else:
            return
        raise RateLimited(f"Your workspace's cap of {reached} a month is reached.", retry_after_seconds=3_600)


async def _count_in(
    limiter: RateLimiter, item: RateLimitItem, names: tuple[str, ...], cost: int
) -> tuple[bool, int, float]:
    """Whether it was let through, what remains, and in how many seconds all of it is free again."""
    passed = await limiter.hit(item, *names, cost=cost) if cost else True
    stats = await limiter.get_window_stats(item, *names)
    return passed, max(0, int(stats.remaining)), max(0.0, stats.reset_time - time.time())


def _span(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `1m3s`."""
    if seconds < 1:
        return f"{ceil(seconds * 1_000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.3g}s"
