-- capture: the hold becomes what was really used. Run by gates, after the usage was emitted. Works while the lane is COLD.
--
-- KEYS  m g hx h:<hold> s:<account>~<scope> ...
-- ARGV  hold, source, sequence, gate, gen, floor, then meter, units ...; a meter that is not named was not used
-- gives [word, gen, off, count]: OK, LATE it had expired, DUP, CONFLICT captured for other usage, GONE closed, void or lost,
--       KEYS a scope is not declared, OVER held would leave int64; the last five write nothing but the mark of a loss
local m, g, hx, h = unpack(KEYS, 1, 4)
local tag, gate = tag_of(m), ARGV[4]
local found = lane(m, g, gate)
local function answer(word) return {word, found.gen, found.off, found.count} end

mark_loss(m, found, ARGV[5], ARGV[6])
local hold = redis.call('HMGET', h, 'st', 'r', 'src', 'seq')
if not hold[1] then return answer('GONE') end
if hold[1] == 'C' then return answer(hold[3] == ARGV[2] and hold[4] == ARGV[3] and 'DUP' or 'CONFLICT') end
local record = cmsgpack.unpack(hold[2])
if not declared(tag, record, 5) then return answer('KEYS') end
local used = amounts(7, 2, '0')
if not fits(tag, record, used) then return answer('OVER') end
move(tag, record, used)
local _, _, now_ms = clock()
redis.call('HSET', h, 'st', 'C', 'src', ARGV[2], 'seq', ARGV[3], 'r', cmsgpack.pack(record))
redis.call('ZADD', hx, whole(now_ms + 60000), ARGV[1])
counted(g, gate, found)
return answer(hold[1] == 'X' and 'LATE' or 'OK')
