-- Reserve a request. ARGV: sender, tokens, longest wait, time limit of a probe. → granted, wait, time to send, senders,
-- time when the breaker last opened, rates.
local sender, costs, patience = ARGV[1], {requests = 1, tokens = tonumber(ARGV[2])}, tonumber(ARGV[3])
local probing = (values.failures or 0) >= 5
redis.call('ZADD', KEYS[2], now, sender)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 60)
redis.call('EXPIRE', KEYS[2], 3600)
local senders = redis.call('ZCARD', KEYS[2])
if now - (values.seen or 0) > 60 then -- start measuring again after a pause
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
  -- After a pause, a second's worth may go at once; a larger request is paid back by those after it.
  if pace then
    set(what .. '_free', math.max(values[what .. '_free'] or 0, now - 1) + costs[what] / pace)
  else
    set(what .. '_sent', (values[what .. '_sent'] or 0) + costs[what])
  end
end
if probing then set('open', now + tonumber(ARGV[4])) end -- the others wait for the probe's outcome
return answer(1, wait)
