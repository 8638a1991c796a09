-- Who used most: principals by calls, in a period.
SELECT account, principal_kind, principal, sum(calls) AS calls, uniqExact(operation) AS operations
FROM usage
WHERE billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')} AND status IN ('ok', 'error')
GROUP BY account, principal_kind, principal
ORDER BY calls DESC, account, principal_kind, principal
LIMIT {most:UInt32}
