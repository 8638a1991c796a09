-- extend: an open hold holds more, or longer. Totals, not additions: safe to run again. Run by gates.
--
-- KEYS  m g p hx h:<hold> s:<account>~<scope> ...
-- ARGV  hold, ttl ms from now, grace ms, gate, gen, floor, then meter, total ...
-- gives [word, gen, off, count, expires ms or '', fields or the one that refused]
--       OK fields = [account~scope, base, units, ...]; DENY [account~scope, base, left]; DONE captured; GONE; COLD; GEN; FROZEN;
--       CLOCK; KEYS. Nothing is written unless OK
local m, g, p, hx, h = unpack(KEYS, 1, 5)
local tag, gate, gen = tag_of(m), ARGV[4], ARGV[5]
local _, _, now_ms = clock()
local found = lane(m, g, gate)
local function answer(word, expires, fields)
  return {word, found.gen, found.off, found.count, expires or '', fields or {}}
end

mark_loss(m, found, gen, ARGV[6])
if found.state ~= 'READY' then return answer('COLD') end
if gen ~= '' and gen ~= found.gen then return answer('GEN') end
if redis.call('HGET', p, 'frozen') == '1' then return answer('FROZEN') end
if now_ms < found.log - 60000 then return answer('CLOCK') end
local hold = redis.call('HMGET', h, 'st', 'r', 'exp')
if hold[1] == 'C' then return answer('DONE') end
if hold[1] ~= 'H' then return answer('GONE') end
local record = cmsgpack.unpack(hold[2])
if not declared(tag, record, 6) then return answer('KEYS') end

local total = amounts(7, 2)
local function larger(base, old)
  local new = total(base, old)
  local ohi, olo = limbs(old)
  local nhi, nlo = limbs(new)
  return below(ohi, olo, nhi, nlo) and new or old
end
-- What other~ has no limit of its own for is limited by the least of all kinds.
local function limit_of(scope, shape)
  local kind = string.match(scope, '^[^:]+')
  if scope ~= 'other~' then
    local own = redis.call('HMGET', p, scope .. shape, kind .. shape)
    return own[1] or own[2]
  end
  local least
  for _, each in ipairs({'user', 'client', 'anon', 'agent', 'sess', 'run'}) do
    local limit = redis.call('HGET', p, each .. shape)
    if limit and (not least or #limit < #least or (#limit == #least and limit < least)) then least = limit end
  end
  return least
end
local seen = {}
for i = 3, #record, 3 do
  local s, base, old = record[i], record[i + 1], record[i + 2]
  local new = larger(base, old)
  if new ~= old then
    local limit = limit_of(string.sub(s, #record[1] + 2), '|' .. string.gsub(base, '^([^ ]+) (%a):%d+$', '%1|%2'))
    local values = redis.call('HMGET', tag .. 's:' .. s, base .. ' u', base .. ' h')
    if not values[2] then return answer('DENY', '', {s, base, '0'}) end
    if limit then
      local hi, lo = available(limit, values[1], values[2], old)
      local nhi, nlo = limbs(new)
      local ohi, olo = limbs(old)
      local times = seen[s .. ' ' .. base] or 0
      local rhi, rlo = normal(hi - nhi - times * (nhi - ohi), lo - nlo - times * (nlo - olo))
      if rhi < 0 then return answer('DENY', '', {s, base, decimal(hi, lo)}) end
      seen[s .. ' ' .. base] = times + 1
    end
  end
end
if not fits(tag, record, larger) then return answer('DENY', '', {'', '', '0'}) end
move(tag, record, larger)
local expires = math.max(tonumber(hold[3]), now_ms + tonumber(ARGV[2]))
redis.call('HSET', h, 'exp', whole(expires), 'r', cmsgpack.pack(record))
redis.call('ZADD', hx, whole(expires + tonumber(ARGV[3])), ARGV[1])
counted(g, gate, found)
return answer('OK', whole(expires), {unpack(record, 3)})
