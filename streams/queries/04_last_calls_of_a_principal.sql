-- A principal's last calls.
SELECT occurred_at, operation, status, latency_us, calls, session, run, model, event_id
FROM usage
WHERE account = {account:String} AND principal_kind = {principal_kind:String} AND principal = {principal:String}
ORDER BY occurred_at DESC, event_id DESC
LIMIT {most:UInt32}
