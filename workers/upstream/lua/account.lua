-- Common beginning of every script: the account of an upstream's model, shared by all its senders.
--
-- A hash holds the state of one upstream's model. Times are seconds of Redis' clock, rates are per second; `<what>` is
-- requests or tokens.
--
-- - `<what>_limit`: limit per minute, from headers.
-- - `<what>_free`: time when the next one may go, at the rate `<what>_pace`.
-- - `<what>_cut_at`, `_cut_to`, `_ceiling`: time of the last refusal, rate after it, and rate that had been too much.
-- - `<what>_sent`: sent since `since`, while no rate was known. `<what>_passed`: let through since then.
-- - `seen`: time of the last request. `told`: time before which nobody sends, as the upstream asked.
-- - `failures`, `opened`, `openings`, `open`: the circuit breaker's failures in a row, time at which it last opened,
--   openings in a row, and time until which it is open.

local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local state = KEYS[1]
local values = {}
local flat = redis.call('HGETALL', state)
for at = 1, #flat, 2 do
  local value = tonumber(flat[at + 1])
  -- A value that can't be a time or a rate isn't ours.
  if value and math.abs(value) < 1e12 then values[flat[at]] = value end
end
local function set(name, value)
  values[name] = value
  redis.call('HSET', state, name, string.format('%.6f', value))
end
redis.call('EXPIRE', state, 3600)
local KINDS = {'requests', 'tokens'}

-- Share of a limit that is used, so that nothing is refused because the upstream counts in another way.
local MARGIN = 0.97

local function rate(what)
  local limit, cut_at = values[what .. '_limit'], values[what .. '_cut_at']
  local cap = limit and MARGIN * limit / 60
  if not cut_at then return cap end
  local age, cut_to, ceiling = math.max(0, now - cut_at), values[what .. '_cut_to'], values[what .. '_ceiling']
  if cap then return math.min(cap, cut_to + 0.02 * cap * age) end
  -- Recover to just below the rate that was too much, stay there for the rest of a minute, and then grow, to see
  -- whether more is let through by now.
  if age <= 60 then return math.min(MARGIN * ceiling, cut_to + 0.01 * ceiling * age) end
  return MARGIN * ceiling * 1.01 ^ (age - 60)
end

-- Return the current rate, and rescale the reservations that were made at another one.
local function repaced(what)
  local pace, before = rate(what), values[what .. '_pace']
  if not pace then return nil end
  local from, free = math.max(now, values.told or 0), values[what .. '_free'] or 0
  if before and free > from then set(what .. '_free', from + (free - from) * before / pace) end
  set(what .. '_pace', pace)
  return pace
end

-- Learn a limit from a reply (0: none). The first one replaces the guess that was made from refusals.
local function learn(what, limit)
  if limit <= 0 or limit == values[what .. '_limit'] then return end
  if not values[what .. '_limit'] and values[what .. '_cut_at'] then set(what .. '_cut_to', limit / 60) end
  set(what .. '_limit', limit)
end

-- Close the breaker: an upstream that answers isn't dead.
local function close_breaker()
  if (values.failures or 0) > 0 then set('failures', 0) set('openings', 0) set('open', 0) end
end
