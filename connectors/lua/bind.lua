-- bind: who the bearer of one token is. Run by the fold alone; the later command wins, so any order and any repeat is safe.
--
-- KEYS  the token's key
-- ARGV  at (append time, ms), partition, offset, account, principal ('' = unbound), scopes, operations (msgpack lists)
-- gives 1 written, 0 what stands there is as late or later
local found = redis.call('HMGET', KEYS[1], 'at', 'partition', 'offset')
if found[1] then
  for i = 1, 3 do
    local theirs, ours = tonumber(found[i]), tonumber(ARGV[i])
    if theirs > ours then return 0 end
    if theirs < ours then break end
    if i == 3 then return 0 end
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'at', ARGV[1], 'partition', ARGV[2], 'offset', ARGV[3], 'account', ARGV[4],
  'principal', ARGV[5], 'scopes', ARGV[6], 'operations', ARGV[7])
return 1
