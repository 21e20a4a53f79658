"""How fast the fleet may send to a gateway: one account in Redis, which all its senders keep together.

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
from math import isfinite
from typing import Any, TypeVar
from uuid import uuid4

import redis
import structlog

from pipeline.jobs import Upstream
from pipeline.spoiled import is_spoiled

log = structlog.get_logger()

Answer = TypeVar("Answer")

_REDIS_SECONDS = 0.5
#: How long Redis isn't asked again after it failed.
_REDIS_REST_SECONDS = 2.0
#: A refusal that doesn't say how long to wait.
_UNTOLD_SECONDS = 1.0

#: State of one gateway's model, a hash. Moments are seconds of Redis' clock, rates per second; `<what>` is requests or
#: tokens.
#:
#: - `<what>_limit`: a minute, as headers say.
#: - `<what>_free`: when the next one may go, at the rate `<what>_pace`.
#: - `<what>_cut_at`, `_cut_to`, `_ceiling`: the last refusal, the rate after it, and the one that had been too much.
#: - `<what>_sent`: while no rate was known, since `since`; `<what>_passed`: let through since then.
#: - `seen`: the last request. `told`: nobody sends before.
#: - `failures`, `opened`, `openings`, `open`: of the breaker.
_COMMON = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local state = KEYS[1]
local values = {}
local flat = redis.call('HGETALL', state)
for at = 1, #flat, 2 do
  local value = tonumber(flat[at + 1])
  if value and math.abs(value) < 1e12 then values[flat[at]] = value end -- what no moment and no rate is isn't ours
end
local function set(name, value)
  values[name] = value
  redis.call('HSET', state, name, string.format('%.6f', value))
end
redis.call('EXPIRE', state, 3600)
local KINDS = {'requests', 'tokens'}

-- What is below a limit by so much is never refused for being counted in another way.
local MARGIN = 0.97

local function rate(what)
  local limit, cut_at = values[what .. '_limit'], values[what .. '_cut_at']
  local cap = limit and MARGIN * limit / 60
  if not cut_at then return cap end
  local age, cut_to, ceiling = math.max(0, now - cut_at), values[what .. '_cut_to'], values[what .. '_ceiling']
  if cap then return math.min(cap, cut_to + 0.02 * cap * age) end
  -- Back to just below what was too much, a minute there, and then on, to see whether more is let through by now.
  if age <= 60 then return math.min(MARGIN * ceiling, cut_to + 0.01 * ceiling * age) end
  return MARGIN * ceiling * 1.01 ^ (age - 60)
end

-- The rate by now. What is queued up at another one takes longer, or less long.
local function repaced(what)
  local pace, before = rate(what), values[what .. '_pace']
  if not pace then return nil end
  local from, free = math.max(now, values.told or 0), values[what .. '_free'] or 0
  if before and free > from then set(what .. '_free', from + (free - from) * before / pace) end
  set(what .. '_pace', pace)
  return pace
end

-- A limit as a reply says it (0: it doesn't). The first word replaces what refusals made guess.
local function learn(what, limit)
  if limit <= 0 or limit == values[what .. '_limit'] then return end
  if not values[what .. '_limit'] and values[what .. '_cut_at'] then set(what .. '_cut_to', limit / 60) end
  set(what .. '_limit', limit)
end

-- One that answers isn't dead.
local function close_breaker()
  if (values.failures or 0) > 0 then set('failures', 0) set('openings', 0) set('open', 0) end
end
"""

#: ARGV: sender, tokens, the longest wait, how long a probe may take. → granted, wait, moment, senders, when the breaker
#: last opened, rates.
_RESERVE = (
    _COMMON
    + """
local sender, costs, patience = ARGV[1], {requests = 1, tokens = tonumber(ARGV[2])}, tonumber(ARGV[3])
local probing = (values.failures or 0) >= 5
redis.call('ZADD', KEYS[2], now, sender)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 60)
redis.call('EXPIRE', KEYS[2], 3600)
local senders = redis.call('ZCARD', KEYS[2])
if now - (values.seen or 0) > 60 then -- what is measured begins anew after a rest
  for _, name in ipairs({'requests_sent', 'tokens_sent', 'requests_passed', 'tokens_passed'}) do set(name, 0) end
  set('since', now)
end
set('seen', now)

local function answer(granted, wait)
  return {granted, tostring(wait), string.format('%.6f', now + wait), senders,
          string.format('%.6f', values.opened or 0), tostring(rate('requests') or 0), tostring(rate('tokens') or 0)}
end

local held = math.max(values.told or 0, values.open or 0)
if held > now then return answer(0, held - now) end

local wait = 0
for _, what in ipairs(KINDS) do
  if repaced(what) then wait = math.max(wait, (values[what .. '_free'] or 0) - now) end
end
if wait > patience or (probing and wait > 0) then return answer(0, wait) end
for _, what in ipairs(KINDS) do
  local pace = rate(what)
  -- A second's worth may go at once after a rest; a request of more is paid back by those after it.
  if pace then
    set(what .. '_free', math.max(values[what .. '_free'] or 0, now - 1) + costs[what] / pace)
  else
    set(what .. '_sent', (values[what .. '_sent'] or 0) + costs[what])
  end
end
if probing then set('open', now + tonumber(ARGV[4])) end -- the others wait for what comes of it
return answer(1, wait)
"""
)

#: ARGV: requests' limit, tokens' limit (0: not said), estimated tokens, tokens.
_PASSED = (
    _COMMON
    + """
local told = {requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2])}
local costs = {requests = 1, tokens = tonumber(ARGV[4])}
close_breaker()
for _, what in ipairs(KINDS) do
  local before = rate(what)
  set(what .. '_passed', (values[what .. '_passed'] or 0) + costs[what])
  learn(what, told[what])
  local pace = repaced(what)
  if pace and not before then
    -- What was sent before the limit was known is paid back.
    set(what .. '_free', (values.since or now) + (values[what .. '_sent'] or 0) / pace)
  end
end
local pace = rate('tokens')
if pace and values.tokens_free then
  -- No count, however wrong, stops the others for more than a minute.
  set('tokens_free', values.tokens_free + math.min(60, (costs.tokens - tonumber(ARGV[3])) / pace))
end
"""
)

#: ARGV: when it was sent, how long to wait, whether requests and whether tokens were too many (1 or 0), requests'
#: limit, tokens' limit (0: not said), estimated tokens.
_REFUSED = (
    _COMMON
    + """
local sent, wait = tonumber(ARGV[1]), tonumber(ARGV[2])
local too_many = {requests = ARGV[3] == '1', tokens = ARGV[4] == '1'}
local told = {requests = tonumber(ARGV[5]), tokens = tonumber(ARGV[6])}
local costs = {requests = 1, tokens = tonumber(ARGV[7])}
close_breaker()
set('told', math.max(values.told or 0, now + wait))
local since = values.since or now

-- The rate that was too much; nil: nothing tells it.
local function ceiling_of(what, known)
  local passed, seconds = values[what .. '_passed'] or 0, math.max(0.1, now - since + wait)
  if values[what .. '_limit'] then return known end
  -- Nothing has come through since the last refusal, or a rest: this one isn't for the rate.
  if passed == 0 then return values[what .. '_ceiling'] end
  -- What was let through, over the time that it took with this wait. But little may have been asked for, or others have
  -- used the limit up, so that what is known, or was sent while nothing was, is halved at most.
  if not known then return math.max((values[what .. '_sent'] or 0) / 2, passed) / seconds end
  return math.max(known / 2, math.min(known, passed / seconds))
end

for _, what in ipairs(KINDS) do
  learn(what, told[what])
  local known = rate(what)
  local ceiling = ceiling_of(what, known)
  -- Those that were under way when the first one was refused tell nothing new.
  if ceiling and too_many[what] and sent > (values[what .. '_cut_at'] or 0) then
    repaced(what)
    local least = costs[what] / 60 -- a request like this one goes every minute, whatever happens
    set(what .. '_ceiling', math.max(ceiling, least))
    set(what .. '_cut_to', 0.85 * math.max(math.min(ceiling, known or ceiling), least))
    set(what .. '_cut_at', now + wait)
    set(what .. '_free', math.max(values[what .. '_free'] or 0, now + wait))
    set(what .. '_passed', 0)
    set('since', now + wait)
  end
end
"""
)

#: ARGV: when it was to be sent, how long a probe may take.
_UNUSED = (
    _COMMON
    + """
-- Others wait for a probe, and this one was it.
if math.abs((values.open or 0) - tonumber(ARGV[1]) - tonumber(ARGV[2])) < 0.001 then set('open', 0) end
"""
)

#: → for how long nobody may send, as gateways told and by the breaker; when the breaker last opened.
_HELD = (
    _COMMON
    + """
return {tostring(math.max(0, (values.told or 0) - now)), tostring(math.max(0, (values.open or 0) - now)),
        string.format('%.6f', values.opened or 0)}
"""
)

#: ARGV: when it was sent, how long to wait (0: not said).
_FAILED = (
    _COMMON
    + """
local sent, wait = tonumber(ARGV[1]), tonumber(ARGV[2])
if wait > 0 then set('told', math.max(values.told or 0, now + wait)) end
-- Those that were under way when the breaker opened tell nothing new.
if sent > (values.opened or 0) then
  set('failures', (values.failures or 0) + 1)
  if values.failures >= 5 then
    set('openings', (values.openings or 0) + 1)
    set('opened', now)
    set('open', now + math.min(60, 2 ^ (values.openings - 1)))
  end
end
"""
)


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
        """As `Throttle.reserve`."""
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
class Throttle:
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
    _scripts: dict[str, Any] = field(default_factory=dict)

    def reserve(self, tokens: int, patience_seconds: float) -> Leave:
        """Ask to send a request of about so many tokens. Nothing is reserved where the wait is longer than patience,
        or of unknown length."""
        found = self._ask(_RESERVE, list, self._sender, tokens, patience_seconds, self.request_seconds)
        if found is None:
            return self._share.reserve(tokens, patience_seconds)
        granted, wait, moment, senders, opened, *rates = found
        self.opened = float(opened)
        self._share.senders = max(1, int(senders))
        self._share.rates = (float(rates[0]), float(rates[1]))
        return Leave(granted=bool(granted), wait_seconds=float(wait), moment=float(moment))

    def give_back(self, leave: Leave) -> None:
        """Nothing is sent on this leave: whatever waits for what comes of it needn't."""
        self._ask(_UNUSED, bool, leave.moment, self.request_seconds)

    def held_seconds(self, *, told: bool = False) -> float:
        """For how long nobody may send, or, `told`, for how long the gateway itself said so."""
        found = self._ask(_HELD, lambda answer: [float(one) for one in answer])
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
        self._ask(_PASSED, bool, *self._limits(headers), estimated_tokens, tokens)

    def refused(self, leave: Leave, headers: Mapping[str, str], tokens: int, wait_seconds: float | None) -> bool:
        """A request was one too many (429). Returns whether it was one too large: of more tokens than a minute's."""
        wait = _UNTOLD_SECONDS if wait_seconds is None else wait_seconds
        left = [_number(headers.get(f"x-ratelimit-remaining-{what}")) for what in ("requests", "tokens")]
        short = [have is not None and have < cost for have, cost in zip(left, (1, tokens), strict=True)]
        if not any(short):
            short = [True, True]
        limits = self._limits(headers)
        if self._ask(_REFUSED, bool, leave.moment, wait, *map(int, short), *limits, tokens) is None:
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
        if self._ask(_FAILED, bool, leave.moment, wait_seconds or 0) is None:
            self._share.hold(wait_seconds or _UNTOLD_SECONDS)

    def _ask(self, script: str, read: Callable[[Any], Answer], *arguments: Any) -> Answer | None:
        """What a script answers; None while Redis is away."""
        if time.monotonic() < self._away_until:
            return None
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        key = f"vectormill:throttle:{account_of(self.upstream, self.key)}"
        run = partial(self._scripts[script], keys=[key, f"{key}:senders"], args=list(arguments))
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
