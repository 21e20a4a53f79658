-- Record an answered request. ARGV: request limit, token limit (0: not given), estimated tokens, tokens.
local told = {requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2])}
local costs = {requests = 1, tokens = tonumber(ARGV[4])}
close_breaker()
for _, what in ipairs(KINDS) do
  local before = rate(what)
  set(what .. '_passed', (values[what .. '_passed'] or 0) + costs[what])
  learn(what, told[what])
  local pace = repaced(what)
  if pace and not before then
    -- Pay back what was sent before the limit was known.
    set(what .. '_free', (values.since or now) + (values[what .. '_sent'] or 0) / pace)
  end
end
local pace = rate('tokens')
if pace and values.tokens_free then
  -- A token count, however wrong, stops the others for a minute at most.
  set('tokens_free', values.tokens_free + math.min(60, (costs.tokens - tonumber(ARGV[3])) / pace))
end
