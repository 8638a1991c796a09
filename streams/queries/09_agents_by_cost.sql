-- Which agents cost most, and what they earned in the same asset.
SELECT
    account,
    agent,
    cost_asset AS asset,
    sum(u.cost) AS cost,
    sumIf(u.revenue, revenue_asset = cost_asset AND status = 'ok') AS revenue,
    sum(u.calls) AS calls
FROM usage AS u
WHERE agent != '' AND u.cost IS NOT NULL AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY account, agent, asset
ORDER BY cost DESC, account, agent, asset
LIMIT {most:UInt32}
