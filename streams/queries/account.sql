-- An account's usage by operation and principal, in a period: `tollway usage`.
SELECT
    operation,
    principal_kind,
    principal,
    status,
    count() AS events,
    sum(calls) AS calls,
    sum(revenue) AS revenue,
    sum(cost) AS cost,
    max(occurred_at) AS last_at
FROM usage
WHERE account = {account:String} AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY operation, principal_kind, principal, status
ORDER BY calls DESC, operation, principal_kind, principal, status
LIMIT 10000
