-- reassert: a gate tells Redis of a hold that it was granted, after Redis has forgotten something. Run by gates, also while
-- the lane is COLD; amounts are not checked against limits: they were granted.
--
-- KEYS  m g hx fx h:<hold> n s:<account>~<scope> ...
-- ARGV  hold, account, call, state H or C, expires ms, grace ms, source, sequence, gate,
--       then account~scope, '<meter> <window>:<start>', units (of C: really used) ...
-- gives [word, gen, off, count]
--       MADE it was missing or expired; OK it was there, and is now at least this; DUP it was captured; COLD there is no lane;
--       KEYS; OVER held would leave int64
local m, g, hx, fx, h, n = unpack(KEYS, 1, 6)
local tag, account, state, gate = tag_of(m), ARGV[2], ARGV[4], ARGV[9]
local FIRST = 10
local _, at, now_ms = clock()
local found = lane(m, g, gate)
local function answer(word) return {word, found.gen, found.off, found.count} end

if not found.state then return answer('COLD') end
local hold = redis.call('HMGET', h, 'st', 'r', 'exp')
if hold[1] == 'C' then return answer('DUP') end
local mine, of_field = {account, ARGV[3]}, {}
for i = FIRST, #ARGV, 3 do
  for j = 0, 2 do mine[#mine + 1] = ARGV[i + j] end
  of_field[ARGV[i + 1]] = ARGV[i + 2] -- equal in every scope of a field
end
if not declared(tag, mine, 7) then return answer('KEYS') end

local expires = tonumber(ARGV[5])
if hold[1] == 'H' then
  local record = cmsgpack.unpack(hold[2])
  if not declared(tag, record, 7) then return answer('KEYS') end
  local function wanted(base, old)
    local new = of_field[base] or old
    if state == 'C' then return new end
    local ohi, olo = limbs(old)
    local nhi, nlo = limbs(new)
    return below(ohi, olo, nhi, nlo) and new or old
  end
  if not fits(tag, record, wanted) then return answer('OVER') end
  local changed = move(tag, record, wanted)
  if state == 'C' then
    redis.call('HSET', h, 'st', 'C', 'src', ARGV[7], 'seq', ARGV[8], 'r', cmsgpack.pack(record))
    redis.call('ZADD', hx, whole(now_ms + 60000), ARGV[1])
    counted(g, gate, found)
  elseif changed or expires > tonumber(hold[3]) then
    expires = math.max(expires, tonumber(hold[3]))
    redis.call('HSET', h, 'exp', whole(expires), 'r', cmsgpack.pack(record))
    redis.call('ZADD', hx, whole(expires + tonumber(ARGV[6])), ARGV[1])
    counted(g, gate, found)
  end
  return answer('OK')
end

-- Missing or expired: held anew. A field whose window ended a day ago has been swept, and is not made again.
local record, last, stops = {account, ARGV[3]}, {}, {}
for i = 3, #mine, 3 do
  local scope, base = mine[i], mine[i + 1]
  local s = tag .. 's:' .. scope
  local held = redis.call('HGET', s, base .. ' h')
  local window, start = string.match(base, ' (%a):(%d+)$')
  local kind = string.match(string.sub(scope, #account + 2), '^[^:]+')
  local _, stop = span(window, window == 'L' and at or tonumber(start), kind)
  if held or not stop or (stop * 1000 + DAY_MS) > found.log then
    record[#record + 1], record[#record + 2], record[#record + 3] = scope, base, mine[i + 2]
    stops[#record] = stop
    if held and #mine[i + 2] > 17 then
      local hi = available(held, '0', '0', mine[i + 2])
      if hi >= HELD_MAX_HI then return answer('OVER') end
    end
  end
end
for i = 3, #record, 3 do
  local s, stop = tag .. 's:' .. record[i], stops[i + 2]
  if string.sub(record[i], -7) ~= '~other~' then made_by_gate(n, s, record[i], account) end
  redis.call('HINCRBY', s, record[i + 1] .. ' h', record[i + 2])
  if stop then redis.call('ZADD', fx, 'GT', whole(stop), record[i] .. ' ' .. record[i + 1]) end
end
redis.call('HSET', h, 'st', state, 'exp', whole(expires), 'r', cmsgpack.pack(record))
if state == 'C' then redis.call('HSET', h, 'src', ARGV[7], 'seq', ARGV[8]) end
redis.call('ZADD', hx, whole(state == 'C' and now_ms + 60000 or expires + tonumber(ARGV[6])), ARGV[1])
counted(g, gate, found)
return answer('MADE')
