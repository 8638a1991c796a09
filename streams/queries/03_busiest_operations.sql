-- The busiest operations, with their latency.
SELECT
    operation,
    surface,
    sum(calls) AS calls,
    toInt64(quantileExact(0.5)(latency_us)) AS p50_us,
    toInt64(quantileExact(0.95)(latency_us)) AS p95_us
FROM usage
WHERE status IN ('ok', 'error')
    AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY operation, surface
ORDER BY calls DESC, operation, surface
LIMIT {most:UInt32}
