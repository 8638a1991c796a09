-- An account's usage by operation and principal, in a period: `tollway usage`.
SELECT
    operation,
    principal_kind,
    principal,
    status,
    count() AS events,
    sum(u.calls) AS calls,
    sum(u.revenue) AS revenue,
    revenue_asset,
    sum(u.cost) AS cost,
    cost_asset,
    max(occurred_at) AS last_at
FROM usage AS u
WHERE account = {account:String} AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY operation, principal_kind, principal, status, revenue_asset, cost_asset
ORDER BY calls DESC, operation, principal_kind, principal, status, revenue_asset, cost_asset
LIMIT 10000
