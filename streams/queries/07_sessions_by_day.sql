-- Distinct sessions, runs and principals by day.
SELECT
    toDate(billed_at) AS day,
    uniqExactIf((account, session), session != '') AS sessions,
    uniqExactIf((account, run), run != '') AS runs,
    uniqExact((account, principal_kind, principal)) AS principals
FROM usage
WHERE billed_at >= {since:DateTime('UTC')} AND billed_at < {until:DateTime('UTC')}
GROUP BY day
ORDER BY day
