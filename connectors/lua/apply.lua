-- apply: one call's worth of a lane's batch, at the offset `off` of its log. Run by the fold alone.
--
-- KEYS  m, the lane's state. All other keys are built from its tag: one cluster slot.
-- ARGV  epoch, off, tok, part, more ('1' or ''), expect ('' = none), log (ms), body
-- body  msgpack [totals, ends, policies, closes]; amounts are decimal strings, never Lua numbers
--       totals    [scope, field, value, ...]  absolute; `scope` is <account>~<scope>, `field` ends in ' u'
--       ends      end, '<scope> <field without u>', ...  the second at which a total's window ends, where it must be told
--       policies  [account, field, value, ...]      replace p:<account>
--       closes    hold ids: each gives back what it holds; no amounts
-- gives [word, off found, state, gen, begun]
--       OK; LOST no lane here, or one behind `expect` (COLD from now on); EPOCH another log's; OLD older than what was begun;
--       BROKEN the parts before this one are not here. Nothing is written unless OK.
local m, epoch, tok, more, expect = KEYS[1], ARGV[1], ARGV[3], ARGV[5], ARGV[6]
local off, part, log = tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[7])
local tag = string.sub(m, 1, -2)
local DAY_S = 86400

local found = redis.call('HMGET', m, 'epoch', 'off', 'state', 'gen', 'begun', 'tok', 'part', 'log')
local function answer(word)
  return {word, found[2] or '', found[3] or '', found[4] or '', found[5] or ''}
end

if not found[1] then return answer('LOST') end
if found[1] ~= epoch then return answer('EPOCH') end
if off < tonumber(found[5]) then return answer('OLD') end
if expect ~= '' and tonumber(found[2]) < tonumber(expect) then
  redis.call('HSET', m, 'state', 'COLD')
  found[3] = 'COLD'
  return answer('LOST')
end
if part > 0 and (found[6] ~= tok or tonumber(found[5]) ~= off or part > tonumber(found[7]) + 1) then
  return answer('BROKEN')
end

local body = cmsgpack.unpack(ARGV[8])
local log_found = tonumber(found[8])
redis.call('HSET', m, 'begun', ARGV[2], 'tok', tok, 'part', ARGV[4])

for _, policy in ipairs(body[3]) do
  local p = tag .. 'p:' .. policy[1]
  redis.call('DEL', p)
  redis.call('HSET', p, unpack(policy, 2))
end

-- A field whose window ended a day ago has been swept: it is not made again, for nothing would remove it.
local totals, ends, swept = body[1], body[2], nil
for i = 1, #ends, 2 do
  if (ends[i] + DAY_S) * 1000 <= log_found then
    swept = swept or {}
    swept[ends[i + 1]] = true
  end
end
if swept then
  local kept, told = {}, {}
  for _, run in ipairs(totals) do
    local some = {run[1]}
    for i = 2, #run, 2 do
      if not swept[run[1] .. ' ' .. string.sub(run[i], 1, -3)] then
        some[#some + 1], some[#some + 2] = run[i], run[i + 1]
      end
    end
    if #some > 1 then kept[#kept + 1] = some end
  end
  for i = 1, #ends, 2 do
    if not swept[ends[i + 1]] then told[#told + 1], told[#told + 2] = ends[i], ends[i + 1] end
  end
  totals, ends = kept, told
end
for _, run in ipairs(totals) do
  redis.call('HSET', tag .. 's:' .. run[1], unpack(run, 2))
end
if #ends > 0 then redis.call('ZADD', tag .. 'fx', unpack(ends)) end

-- move(hold, 0): the hold's present amounts leave the fields that still exist; a field that is gone is not made again.
for _, hold in ipairs(body[4]) do
  local h = tag .. 'h:' .. hold
  local packed = redis.call('HGET', h, 'r')
  if packed then
    local record = cmsgpack.unpack(packed) -- [account, call, scope, field, amount, ...]
    for i = 3, #record, 3 do
      local s, f = tag .. 's:' .. record[i], record[i + 1] .. ' h'
      if record[i + 2] ~= '0' and redis.call('HEXISTS', s, f) == 1 then
        redis.call('HINCRBY', s, f, '-' .. record[i + 2])
      end
    end
    redis.call('DEL', h)
  end
  redis.call('ZREM', tag .. 'hx', hold)
end

if more == '' then
  if log > log_found then log_found = log end
  redis.call('HSET', m, 'off', ARGV[2], 'log', string.format('%.0f', log_found))
end
return answer('OK')
