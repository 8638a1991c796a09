-- rewrite_begin: the lane is COLD until all totals have been written anew. Holds are not touched.
--
-- KEYS  m     ARGV  epoch, off
-- gives [word, off found, state, gen, begun, gates]; gates = number of gates that have acknowledged writes here
--       OK; OLD older than what was begun; EPOCH the lane belongs to a log of the same or a later growth step.
local m, epoch, off = KEYS[1], ARGV[1], tonumber(ARGV[2])
local found = redis.call('HMGET', m, 'epoch', 'off', 'state', 'gen', 'begun', 'log')
local function answer(word, gates)
  return {word, found[2] or '', found[3] or '', found[4] or '', found[5] or '', gates}
end

if found[1] and found[1] ~= epoch then
  local growth = '^(%d+)%-'
  local mine, theirs = string.match(epoch, growth), string.match(found[1], growth)
  if not (mine and theirs and tonumber(mine) > tonumber(theirs)) then return answer('EPOCH', 0) end
elseif found[1] and off < tonumber(found[5]) then
  return answer('OLD', 0)
end

local now = redis.call('TIME')
local gen = tonumber(now[1]) * 1000000 + tonumber(now[2]) -- never repeats, so that two histories never look alike
if found[4] and tonumber(found[4]) >= gen then gen = tonumber(found[4]) + 1 end
found[2], found[3], found[4], found[5] = '-1', 'COLD', string.format('%.0f', gen), ARGV[2]
redis.call('HSET', m, 'epoch', epoch, 'gen', found[4], 'state', 'COLD', 'off', '-1', 'begun', ARGV[2], 'tok', '', 'part', '-1')
redis.call('HSETNX', m, 'log', '0')
return answer('OK', redis.call('HLEN', string.sub(m, 1, -2) .. 'g'))
