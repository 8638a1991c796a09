-- rewrite_end: everything has been written since the rewrite of generation `gen` began, complete up to `off`.
--
-- KEYS  m     ARGV  epoch, gen, off
-- gives [word, off found, state, gen, begun]
--       OK; EPOCH another rewrite has begun, or it is another log's; LOST an older copy of this very rewrite came back.
local m = KEYS[1]
local found = redis.call('HMGET', m, 'epoch', 'off', 'state', 'gen', 'begun')
local function answer(word)
  return {word, found[2] or '', found[3] or '', found[4] or '', found[5] or ''}
end

if not found[1] then return answer('LOST') end
if found[1] ~= ARGV[1] or found[4] ~= ARGV[2] then return answer('EPOCH') end
if tonumber(found[2]) < tonumber(ARGV[3]) then return answer('LOST') end
redis.call('HSET', m, 'state', 'READY')
found[3] = 'READY'
return answer('OK')
