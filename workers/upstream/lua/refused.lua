-- ARGV: when it was sent, how long to wait, whether requests and whether tokens were too many (1 or 0), requests'
-- limit, tokens' limit (0: not said), estimated tokens.
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
