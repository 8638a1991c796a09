-- authorize: a hold in all scopes at once, or nothing. Run by gates.
--
-- KEYS  m g p hx fx i:<account>~<call> h:<hold> n s:<account>~other~ s:<account>~<scope> ...
-- ARGV  account, call, fingerprint, hold, ttl ms, grace ms, gate, gen, floor, scopes max, 'default' where an unknown
--       account has no limits or '', then meter, ask, least ...
-- gives [word, gen, off, count, outage, at us, staleness ms or ''] and, in msgpack,
--       OK, DUP, CONFLICT   [fingerprint, hold, at us, expires ms, [meter, units ...], rows]; CONFLICT without: hold id used
--       DENY, CLOSED        [the row that refused, rows]; nothing is written
--       COLD, CLOCK, GEN, UNKNOWN, FROZEN, STALE   nothing
--       rows = [account~scope, '<meter> <window>:<start>', end or '', limit, left, units] each
local m, g, p, hx, fx, i, h, n, other = unpack(KEYS, 1, 9)
local account, call, fingerprint, hold = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local gate, gen, floor = ARGV[7], ARGV[8], ARGV[9]
local tag = tag_of(m)
local prefix = #tag + #account + 4 -- of a scope's name in its key

local at_us, at, now_ms = clock()
local found = lane(m, g, gate)
local policy = redis.call('HMGET', p, 'v', 'frozen', 'full', 'outage', 'max_staleness_s', 'limited')
local function answer(word, body)
  local stale = found.state and whole(now_ms - found.log) or ''
  return {word, found.gen, found.off, found.count, policy[4] or '', at_us, stale, body}
end

local known = redis.call('GET', i)
if known then
  return answer(cmsgpack.unpack(known)[1] == fingerprint and 'DUP' or 'CONFLICT', known)
end
mark_loss(m, found, gen, floor)
if found.state ~= 'READY' then return answer('COLD') end
if gen ~= '' and gen ~= found.gen then return answer('GEN') end
if redis.call('EXISTS', h) == 1 then return answer('CONFLICT') end
if not policy[1] and ARGV[11] ~= 'default' then return answer('UNKNOWN') end
if policy[2] == '1' then return answer('FROZEN') end
if now_ms < found.log - 60000 then return answer('CLOCK') end

local asked = {} -- meter -> limbs of its ask, later lowered to what is granted, and of its least
for a = 12, #ARGV, 3 do
  local hi, lo = limbs(ARGV[a + 1])
  local least_hi, least_lo = limbs(ARGV[a + 2])
  asked[ARGV[a]] = {hi = hi, lo = lo, least_hi = least_hi, least_lo = least_lo}
end
local shapes = {} -- the (meter, window) pairs that have a limit somewhere in the policy, in the window of now
local function watch(meter, window)
  local start, stop = span(window, at)
  local base = meter .. ' ' .. window .. ':' .. whole(start)
  shapes[#shapes + 1] = {ask = asked[meter], base = base, used = base .. ' u', held = base .. ' h', stop = stop,
    limit = '|' .. meter .. '|' .. window}
end
for meter, windows in string.gmatch(policy[6] or '', '([^ :]+):(%a+)') do
  for window in string.gmatch(windows, '%a') do watch(meter, window) end
end
if policy[1] and not policy[6] then
  for meter in pairs(asked) do
    for _, window in ipairs({'m', 'h', 'd', 'M', 'L'}) do watch(meter, window) end
  end
end

local kinds, names, limits = {}, {}, {}
for k = 10, #KEYS do
  local scope = string.sub(KEYS[k], prefix)
  local kind = string.match(scope, '^[^:]+')
  kinds[k] = kind
  for _, shape in ipairs(shapes) do
    local n = #names
    names[n + 1], names[n + 2] = scope .. shape.limit, kind .. shape.limit
  end
end
if #shapes > 0 then limits = redis.call('HMGET', p, unpack(names)) end

-- A scope beyond the bound of live scopes is counted in other~, as the fold does.
local full = policy[3] == '1' or tonumber(redis.call('HGET', n, account) or '0') >= tonumber(ARGV[10])
local rows, shared, watched, first = {}, {}, false, 0
for k = 10, #KEYS do
  local s, life = KEYS[k], nil
  if kinds[k] == 'run' or kinds[k] == 'sess' then life = at + IDLE_S end
  local mine, fields = {}, {}
  for j, shape in ipairs(shapes) do
    local limit = limits[first + 2 * j - 1] or limits[first + 2 * j]
    if limit then
      mine[#mine + 1] = {shape = shape, ask = shape.ask, limit = limit, stop = shape.stop or life}
      fields[#fields + 1], fields[#fields + 2] = shape.used, shape.held
    end
  end
  first = first + 2 * #shapes
  if full and redis.call('EXISTS', s) == 0 then s, life = other, nil end
  if life then fields[#fields + 1] = '~closed L:0 u' end
  local values, name = #fields > 0 and redis.call('HMGET', s, unpack(fields)), string.sub(s, #tag + 3)
  if life and values[#fields] then
    return answer('CLOSED', cmsgpack.pack({{name, '', '', '0', '0', '0'}, {}}))
  end
  for j, row in ipairs(mine) do
    local ask = row.ask
    row.s, row.name, row.used, row.held = s, name, values[2 * j - 1], values[2 * j]
    row.hi, row.lo = available(row.limit, row.used, row.held)
    if ask and s == other then
      -- Two scopes that share other~ count twice there: the second one finds what the first may take gone.
      local before = shared[row.shape] or 0
      shared[row.shape] = before + 1
      row.hi, row.lo = normal(row.hi - ask.hi * before, row.lo - ask.lo * before)
    end
    watched = watched or not ask
    rows[#rows + 1] = row
  end
end
local staleness_max = tonumber(policy[5] or '') or 30
if watched and now_ms - found.log > staleness_max * 1000 then return answer('STALE') end

local least, told = nil, {}
for j, row in ipairs(rows) do
  told[j] = {row.name, row.shape.base, row.stop and whole(row.stop) or '', row.limit, '', '0'}
  local hi, lo = 0, 1 -- a meter that is not asked for must not be used up
  if row.ask then hi, lo = row.ask.least_hi, row.ask.least_lo end
  if below(row.hi, row.lo, hi, lo) and (not least or below(row.hi, row.lo, rows[least].hi, rows[least].lo)) then
    least = j
  end
end
if least then
  for j, row in ipairs(rows) do told[j][5] = decimal(row.hi, row.lo) end
  return answer('DENY', cmsgpack.pack({told[least], told}))
end

for _, row in ipairs(rows) do
  local ask = row.ask
  if ask and below(row.hi, row.lo, ask.hi, ask.lo) then ask.hi, ask.lo = row.hi, row.lo end
end
local granted = {}
for meter, ask in pairs(asked) do
  ask.units = decimal(ask.hi, ask.lo)
  granted[#granted + 1], granted[#granted + 2] = meter, ask.units
end

local record, made = {account, call}, {}
for j, row in ipairs(rows) do
  local ask, mine = row.ask, told[j]
  if ask then
    mine[5], mine[6] = decimal(normal(row.hi - ask.hi, row.lo - ask.lo)), ask.units
    if row.s ~= other and not made[row.s] then
      made[row.s] = true
      if not (row.used or row.held) then made_by_gate(n, row.s, row.name, account) end
    end
    redis.call('HINCRBY', row.s, row.shape.held, ask.units)
    if row.stop and (not row.held or row.stop - at > 31 * 86400) then
      redis.call('ZADD', fx, 'GT', whole(row.stop), row.name .. ' ' .. row.shape.base)
    end
    local r = #record
    record[r + 1], record[r + 2], record[r + 3] = row.name, row.shape.base, ask.units
  else
    mine[5] = decimal(row.hi, row.lo)
  end
end
local expires = now_ms + tonumber(ARGV[5])
redis.call('HSET', h, 'st', 'H', 'exp', whole(expires), 'r', cmsgpack.pack(record))
redis.call('ZADD', hx, whole(expires + tonumber(ARGV[6])), hold)
local earlier = cmsgpack.pack({fingerprint, hold, at_us, whole(expires), granted, told})
redis.call('SET', i, earlier, 'PX', whole(math.max(3600000, tonumber(ARGV[5]))))
counted(g, gate, found)
return answer('OK', earlier)
