-- Revenue, cost and margin by provider, model and asset: only what is ok earns.
SELECT
    provider,
    model,
    asset,
    sum(calls) AS calls,
    sum(earned) AS revenue,
    sum(spent) AS cost,
    revenue - cost AS margin
FROM
(
    SELECT provider, model, revenue_asset AS asset, calls, revenue AS earned, toDecimal128(0, 9) AS spent
    FROM usage
    WHERE revenue IS NOT NULL AND status = 'ok'
        AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
    UNION ALL
    SELECT provider, model, cost_asset, if(revenue IS NULL OR status != 'ok', calls, 0), toDecimal128(0, 9), cost
    FROM usage
    WHERE cost IS NOT NULL AND billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
)
GROUP BY provider, model, asset
ORDER BY margin DESC, provider, model, asset
