-- What the gate's scripts share; each of them is this text and its own.
--
-- Amounts are decimal strings up to 9*10^18, changed by HINCRBY, compared as two limbs of 10^9 (Lua numbers are doubles).
-- A field of a scope's hash is '<meter> <window>:<start>' + ' u' (used, the fold's) or ' h' (held, the sum of its open holds).
local LIMB = 1000000000
local DAY_MS = 86400000
local HELD_MAX_HI = 9200000000 -- held stays under 9.2*10^18: HINCRBY refuses an overflow in the middle of a script

local function limbs(text)
  local sign = 1
  if string.byte(text) == 45 then sign, text = -1, string.sub(text, 2) end
  local n = #text
  if n <= 9 then return 0, sign * tonumber(text) end
  return sign * tonumber(string.sub(text, 1, n - 9)), sign * tonumber(string.sub(text, n - 8))
end

-- The lower limb in 0 .. 10^9 - 1; the upper one carries the sign.
local function normal(hi, lo)
  local carry = math.floor(lo / LIMB)
  return hi + carry, lo - carry * LIMB
end

local function below(ahi, alo, bhi, blo) return ahi < bhi or (ahi == bhi and alo < blo) end

local function decimal(hi, lo)
  if hi > -9000000 and hi < 9000000 then return string.format('%.0f', hi * LIMB + lo) end -- exact in a double
  local sign = ''
  if hi < 0 then
    sign, hi = '-', -hi
    if lo > 0 then hi, lo = hi - 1, LIMB - lo end
  end
  return sign .. string.format('%.0f%09.0f', hi, lo)
end

local function whole(number) return string.format('%.0f', number) end

-- limit - used - held + more, normalised.
local function available(limit, used, held, more)
  used, held, more = used or '0', held or '0', more or '0'
  if #limit < 16 and #used < 16 and #held < 16 and #more < 16 then -- the sum is exact in a double
    return normal(0, tonumber(limit) - tonumber(used) - tonumber(held) + tonumber(more))
  end
  local lhi, llo = limbs(limit)
  local uhi, ulo = limbs(used)
  local hhi, hlo = limbs(held)
  local mhi, mlo = limbs(more)
  return normal(lhi - uhi - hhi + mhi, llo - ulo - hlo + mlo)
end

-- Day of the month, 0 .. 30, of a day since 1970 (proleptic Gregorian; the year begins in March).
local function day_of_month(day)
  local z = day + 719468
  local doe = z % 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  return doy - math.floor((153 * mp + 2) / 5)
end

-- Start and end in seconds of the window that `at` lies in; the life of a run or session ends 35 days after its last use.
local LENGTH_S, IDLE_S = {m = 60, h = 3600, d = 86400}, 35 * 86400
local function span(window, at, kind)
  local length = LENGTH_S[window]
  if length then
    local start = at - at % length
    return start, start + length
  end
  if window == 'L' then return 0, (kind == 'run' or kind == 'sess') and at + IDLE_S or nil end
  local day = math.floor(at / 86400)
  local first = day - day_of_month(day)
  local after = first + 31
  return first * 86400, (after - day_of_month(after)) * 86400
end

local function meter_of(base) return (string.match(base, '^[^ ]+')) end

local function clock()
  local now = redis.call('TIME')
  return now[1] .. string.format('%06d', tonumber(now[2])), tonumber(now[1]), math.floor(tonumber(now[1]) * 1000 + tonumber(now[2]) / 1000)
end

-- The lane as a gate finds it. A gate that was told of more than Redis now knows has found a loss: COLD, with a generation
-- that no one had, so that every gate re-asserts its holds.
local function lane(m, g, gate)
  local found = redis.call('HMGET', m, 'gen', 'state', 'off', 'log')
  return {gen = found[1] or '', state = found[2], off = found[3] or '', log = tonumber(found[4] or '0'),
    count = redis.call('HGET', g, gate) or '0'}
end

local function mark_loss(m, found, gen, floor)
  if not found.state or gen == '' then return end
  local mine, theirs = tonumber(gen), tonumber(found.gen)
  if mine > theirs or (mine == theirs and tonumber(found.count) < tonumber(floor)) then
    found.gen, found.state = whole(math.max(mine, theirs) + 1), 'COLD'
    redis.call('HSET', m, 'state', 'COLD', 'gen', found.gen)
  end
end

local function counted(g, gate, found) found.count = whole(redis.call('HINCRBY', g, gate, 1)) end

-- Whether ' h' of every field can take `wanted` instead of what the hold holds; asked before anything is written.
local function fits(tag, record, wanted)
  for i = 3, #record, 3 do
    local new = wanted(record[i + 1], record[i + 2])
    if #new > 17 then
      local held = redis.call('HGET', tag .. 's:' .. record[i], record[i + 1] .. ' h')
      if held then
        local hi = available(held, record[i + 2], '0', new)
        if hi >= HELD_MAX_HI then return false end
      end
    end
  end
  return true
end

-- move(hold, new): ' h' changes only where it exists; the amounts in the record become `wanted` in the same step.
local function move(tag, record, wanted)
  local changed = false
  for i = 3, #record, 3 do
    local s, f, old = tag .. 's:' .. record[i], record[i + 1] .. ' h', record[i + 2]
    local new = wanted(record[i + 1], old)
    if new ~= old then
      changed = true
      if redis.call('HEXISTS', s, f) == 1 then
        if old ~= '0' then redis.call('HINCRBY', s, f, '-' .. old) end
        if new ~= '0' then redis.call('HINCRBY', s, f, new) end
      end
      record[i + 2] = new
    end
  end
  return changed
end

local function nothing() return '0' end

-- Whether every scope that a record names is among the declared keys: an undeclared one leaves half a write when its
-- cluster slot moves.
local function declared(tag, record, first)
  local known = {}
  for k = first, #KEYS do known[KEYS[k]] = true end
  for i = 3, #record, 3 do
    if not known[tag .. 's:' .. record[i]] then return false end
  end
  return true
end

-- meter -> amount from the arguments; what is not named is `other`.
local function amounts(first, step, other)
  local named, known = {}, {}
  for i = first, #ARGV, step do named[ARGV[i]] = ARGV[i + 1] end
  return function(base, old)
    local units = known[base]
    if units == nil then
      units = named[meter_of(base)] or other or false
      known[base] = units
    end
    return units or old
  end
end

-- A scope that a gate makes counts towards the account's bound until it is swept.
local function made_by_gate(n, s, scope, account)
  if redis.call('EXISTS', s) == 0 and redis.call('HSETNX', n, scope, '1') == 1 then
    redis.call('HINCRBY', n, account, 1)
  end
end

local function tag_of(m) return string.sub(m, 1, -2) end
