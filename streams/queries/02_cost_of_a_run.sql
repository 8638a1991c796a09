-- What a run cost and earned, with all runs below it.
SELECT
    if(run = {run:String}, 'itself', 'below it') AS part,
    count() AS events,
    uniqExact(run) AS runs,
    sum(calls) AS calls,
    sum(cost) AS cost,
    sum(revenue) AS revenue
FROM usage
WHERE account = {account:String} AND (run = {run:String} OR has(path, {run:String}))
GROUP BY part
ORDER BY part DESC
