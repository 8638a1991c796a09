-- How usage is paid: by rail, invoiced where there is none, and what is never billed.
SELECT
    multiIf(status != 'ok', 'not billed', rail = '', 'invoice', rail) AS paid_by,
    revenue_asset AS asset,
    count() AS events,
    sum(calls) AS calls,
    sum(revenue) AS revenue
FROM usage
WHERE billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY paid_by, asset
ORDER BY paid_by, asset
