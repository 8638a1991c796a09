-- What a run cost and earned, with all runs below it.
SELECT
    of_run,
    asset,
    sum(earned) AS revenue,
    sum(spent) AS cost,
    revenue - cost AS margin
FROM
(
    SELECT arrayPushBack(path, run) AS chain, revenue_asset AS asset, revenue AS earned, toDecimal128(0, 9) AS spent
    FROM usage
    WHERE account = {account:String} AND (run = {run:String} OR has(path, {run:String})) AND revenue IS NOT NULL AND status = 'ok'
    UNION ALL
    SELECT arrayPushBack(path, run), cost_asset, toDecimal128(0, 9), cost
    FROM usage
    WHERE account = {account:String} AND (run = {run:String} OR has(path, {run:String})) AND cost IS NOT NULL
)
ARRAY JOIN arraySlice(chain, indexOf(chain, {run:String})) AS of_run
GROUP BY of_run, asset
ORDER BY of_run != {run:String}, of_run, asset
