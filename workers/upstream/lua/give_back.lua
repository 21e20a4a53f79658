-- Give back an unused leave. ARGV: time at which it was to be sent, time limit of a probe.
-- If it was the probe, the others wait for it no longer.
if math.abs((values.open or 0) - tonumber(ARGV[1]) - tonumber(ARGV[2])) < 0.001 then set('open', 0) end
