-- ARGV: when it was to be sent, how long a probe may take.
-- Others wait for a probe, and this one was it.
if math.abs((values.open or 0) - tonumber(ARGV[1]) - tonumber(ARGV[2])) < 0.001 then set('open', 0) end
