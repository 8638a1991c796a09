-- void: the call will not be executed; all that it holds is free again, and its call id too. Run by gates.
--
-- KEYS  m hx h:<hold> i:<account>~<call> s:<account>~<scope> ...     ARGV  hold
-- gives [word, gen, off]: OK, GONE closed, expired, void or lost, DONE captured, KEYS a scope is not declared
local m, hx, h, i = unpack(KEYS, 1, 4)
local tag = tag_of(m)
local found = redis.call('HMGET', m, 'gen', 'off')
local function answer(word) return {word, found[1] or '', found[2] or ''} end

local hold = redis.call('HMGET', h, 'st', 'r')
if hold[1] == 'C' then return answer('DONE') end
if hold[1] ~= 'H' then return answer('GONE') end
local record = cmsgpack.unpack(hold[2])
if not declared(tag, record, 5) then return answer('KEYS') end
move(tag, record, nothing)
redis.call('DEL', h, i)
redis.call('ZREM', hx, ARGV[1])
return answer('OK')
