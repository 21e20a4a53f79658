-- → for how long nobody may send, as gateways told and by the breaker; when the breaker last opened.
return {tostring(math.max(0, (values.told or 0) - now)), tostring(math.max(0, (values.open or 0) - now)),
        string.format('%.6f', values.opened or 0)}
