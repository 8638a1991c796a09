-- sweep: end what is due by the log time that Redis itself has reached. A lagging stream makes this later, never sooner.
--
-- KEYS  m     ARGV  limit, the most holds and the most fields in one call
-- gives [word, unsettled, asked, fields, more]
--       unsettled  holds that expired uncaptured
--       asked      [hold, source, sequence, ...] of captured ones: their usage may be folded, then the fold closes them
--       fields     window fields removed      more  1 where the limit was reached
-- `n` counts the scopes that gates made: one that is gone is counted no longer.
local m, limit = KEYS[1], tonumber(ARGV[1])
local tag = string.sub(m, 1, -2)
local found = redis.call('HMGET', m, 'state', 'log')
if found[1] ~= 'READY' then return {'COLD', {}, {}, 0, 0} end
local t = tonumber(found[2])
local DAY_MS, ASK_AGAIN_MS = 86400000, 60000
local hx, fx, n = tag .. 'hx', tag .. 'fx', tag .. 'n'

-- move(hold, 0), and the amounts in the record become 0 in the same step: kept ones would be subtracted twice.
local function expire(h, hold)
  local record = cmsgpack.unpack(redis.call('HGET', h, 'r'))
  for i = 3, #record, 3 do
    local s, f = tag .. 's:' .. record[i], record[i + 1] .. ' h'
    if record[i + 2] ~= '0' and redis.call('HEXISTS', s, f) == 1 then
      redis.call('HINCRBY', s, f, '-' .. record[i + 2])
    end
    record[i + 2] = '0'
  end
  redis.call('HSET', h, 'st', 'X', 'r', cmsgpack.pack(record))
  redis.call('DEL', tag .. 'i:' .. record[1] .. '~' .. record[2])
  redis.call('ZADD', hx, string.format('%.0f', t + DAY_MS), hold)
end

local unsettled, asked = {}, {}
local holds = redis.call('ZRANGEBYSCORE', hx, '-inf', string.format('%.0f', t), 'LIMIT', 0, limit)
for _, hold in ipairs(holds) do
  local h = tag .. 'h:' .. hold
  local state = redis.call('HMGET', h, 'st', 'src', 'seq')
  if state[1] == 'H' then
    expire(h, hold)
    unsettled[#unsettled + 1] = hold
  elseif state[1] == 'C' then
    for _, text in ipairs({hold, state[2] or '', state[3] or ''}) do asked[#asked + 1] = text end
    redis.call('ZADD', hx, string.format('%.0f', t + ASK_AGAIN_MS), hold)
  else
    redis.call('DEL', h)
    redis.call('ZREM', hx, hold)
  end
end

local fields = 0
local gone_s = string.format('%.0f', math.floor((t - DAY_MS) / 1000))
local ended = redis.call('ZRANGEBYSCORE', fx, '-inf', gone_s, 'LIMIT', 0, limit)
for _, member in ipairs(ended) do
  local scope, field = string.match(member, '^(%S+) (.+)$')
  local s = tag .. 's:' .. scope
  local held = redis.call('HGET', s, field .. ' h')
  if string.sub(field, -4) == ' L:0' and held and held ~= '0' then
    redis.call('ZADD', fx, string.format('%.0f', math.floor(t / 1000)), member) -- a life with an open hold stays a day more
  else
    redis.call('HDEL', s, field .. ' u', field .. ' h')
    redis.call('ZREM', fx, member)
    fields = fields + 1
    if redis.call('EXISTS', s) == 0 and redis.call('HDEL', n, scope) == 1 then
      local account = string.match(scope, '^[^~]+')
      if redis.call('HINCRBY', n, account, -1) <= 0 then redis.call('HDEL', n, account) end
    end
  end
end
return {'OK', unsettled, asked, fields, (#holds == limit or #ended == limit) and 1 or 0}
