-- bindings_ready: a partition has written all its bindings up to `mark`. Run by the fold alone.
--
-- KEYS  the key that says which partitions have
-- ARGV  epoch, partitions of that log, partition, mark
-- gives 1, or 0 where a later growth step of the log is here already
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and epoch ~= ARGV[1] then
  local theirs, ours = tonumber(string.match(epoch, '^%d+')), tonumber(string.match(ARGV[1], '^%d+'))
  if theirs > ours then return 0 end
  redis.call('DEL', KEYS[1])
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'partitions', ARGV[2], ARGV[3], ARGV[4])
return 1
