-- What every script begins with: one account of a gateway's model, which all senders keep together.
--
-- State of one gateway's model, a hash. Moments are seconds of Redis' clock, rates per second; `<what>` is requests or
-- tokens.
--
-- - `<what>_limit`: a minute, as headers say.
-- - `<what>_free`: when the next one may go, at the rate `<what>_pace`.
-- - `<what>_cut_at`, `_cut_to`, `_ceiling`: the last refusal, the rate after it, and the one that had been too much.
-- - `<what>_sent`: while no rate was known, since `since`; `<what>_passed`: let through since then.
-- - `seen`: the last request. `told`: nobody sends before.
-- - `failures`, `opened`, `openings`, `open`: of the breaker.

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
