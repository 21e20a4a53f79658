-- Record a failed request. ARGV: time of sending, seconds to wait (0: not given).
local sent, wait = tonumber(ARGV[1]), tonumber(ARGV[2])
if wait > 0 then set('told', math.max(values.told or 0, now + wait)) end
-- Requests that were in flight when the breaker opened tell nothing new.
if sent > (values.opened or 0) then
  set('failures', (values.failures or 0) + 1)
  if values.failures >= 5 then
    set('openings', (values.openings or 0) + 1)
    set('opened', now)
    set('open', now + math.min(60, 2 ^ (values.openings - 1)))
  end
end
