-- → seconds for which nobody may send, as the upstream asked and by the breaker; time when the breaker last opened.
return {tostring(math.max(0, (values.told or 0) - now)), tostring(math.max(0, (values.open or 0) - now)),
        string.format('%.6f', values.opened or 0)}
