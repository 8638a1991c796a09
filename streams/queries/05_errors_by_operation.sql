-- Errors and refusals by operation, with their share in a thousand.
SELECT
    operation,
    sum(u.calls) AS calls,
    sumIf(u.calls, status = 'error') AS errors,
    sumIf(u.calls, status IN ('denied', 'rate_limited', 'payment_required')) AS refused,
    intDiv(errors * 1000, greatest(calls, 1)) AS errors_permille
FROM usage AS u
WHERE billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY operation
ORDER BY errors DESC, operation
