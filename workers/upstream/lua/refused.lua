-- Record a refusal (429). ARGV: time of sending, seconds to wait, 1 if requests and 1 if tokens were too many (else 0),
-- request limit, token limit (0: not given), estimated tokens.
local sent, wait = tonumber(ARGV[1]), tonumber(ARGV[2])
local too_many = {requests = ARGV[3] == '1', tokens = ARGV[4] == '1'}
local told = {requests = tonumber(ARGV[5]), tokens = tonumber(ARGV[6])}
local costs = {requests = 1, tokens = tonumber(ARGV[7])}
close_breaker()
set('told', math.max(values.told or 0, now + wait))
local since = values.since or now

-- Return the rate that was too much; nil if it isn't known.
local function ceiling_of(what, known)
  local passed, seconds = values[what .. '_passed'] or 0, math.max(0.1, now - since + wait)
  if values[what .. '_limit'] then return known end
  -- Nothing has come through since the last refusal or a pause, so the rate isn't the cause of this one.
  if passed == 0 then return values[what .. '_ceiling'] end
  -- The rate is what was let through, over the time that it took including this wait. But demand may have been low, or
  -- others may have used the limit up, so the known rate, or else the amount sent without one, is at most halved.
  if not known then return math.max((values[what .. '_sent'] or 0) / 2, passed) / seconds end
  return math.max(known / 2, math.min(known, passed / seconds))
end

for _, what in ipairs(KINDS) do
  learn(what, told[what])
  local known = rate(what)
  local ceiling = ceiling_of(what, known)
  -- Requests that were in flight when the first one was refused tell nothing new.
  if ceiling and too_many[what] and sent > (values[what .. '_cut_at'] or 0) then
    repaced(what)
    local least = costs[what] / 60 -- one request like this goes every minute in any case
    set(what .. '_ceiling', math.max(ceiling, least))
    set(what .. '_cut_to', 0.85 * math.max(math.min(ceiling, known or ceiling), least))
    set(what .. '_cut_at', now + wait)
    set(what .. '_free', math.max(values[what .. '_free'] or 0, now + wait))
    set(what .. '_passed', 0)
    set('since', now + wait)
  end
end
