-- An account's units by hour and meter.
SELECT toStartOfHour(billed_at) AS hour, meter, sum(units) AS units, count() AS events
FROM usage
ARRAY JOIN mapKeys(quantities) AS meter, mapValues(quantities) AS units
WHERE
    account = {account:String}
    AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
    AND status IN ('ok', 'error')
GROUP BY hour, meter
ORDER BY hour, meter
