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

local asked, grant = {}, {}
for a = 12, #ARGV, 3 do
  asked[ARGV[a]] = {ask = ARGV[a + 1], least = ARGV[a + 2]}
end
local shapes = {} -- the (meter, window) pairs that have a limit somewhere in the policy
for meter, windows in string.gmatch(policy[6] or '', '([^ :]+):(%a+)') do
  for window in string.gmatch(windows, '%a') do shapes[#shapes + 1] = {meter, window} end
end
if policy[1] and not policy[6] then
  for meter in pairs(asked) do
    for _, window in ipairs({'m', 'h', 'd', 'M', 'L'}) do shapes[#shapes + 1] = {meter, window} end
  end
end

-- A scope beyond the bound of live scopes is counted in other~, as the fold does.
local full = policy[3] == '1' or tonumber(redis.call('HGET', n, account) or '0') >= tonumber(ARGV[10])
local rows, twice, watched, names = {}, {}, false, {}
for k = 10, #KEYS do
  local scope = string.sub(KEYS[k], prefix)
  local kind = string.match(scope, '^[^:]+')
  for _, shape in ipairs(shapes) do
    local limit = '|' .. shape[1] .. '|' .. shape[2]
    names[#names + 1] = scope .. limit
    names[#names + 1] = kind .. limit
  end
end
local limits = #shapes > 0 and redis.call('HMGET', p, unpack(names)) or {}
for k = 10, #KEYS do
  local s, kind, first = KEYS[k], string.match(KEYS[k], '^[^:]+', prefix), 2 * #shapes * (k - 10)
  local mine, fields = {}, {}
  for j, shape in ipairs(shapes) do
    local limit = limits[first + 2 * j - 1] or limits[first + 2 * j]
    if limit then
      local start, stop = span(shape[2], at, kind)
      local base = shape[1] .. ' ' .. shape[2] .. ':' .. whole(start)
      mine[#mine + 1] = {base = base, stop = stop, limit = limit, ask = asked[shape[1]], meter = shape[1]}
      fields[#fields + 1], fields[#fields + 2] = base .. ' u', base .. ' h'
    end
  end
  local ends = kind == 'run' or kind == 'sess'
  if full and redis.call('EXISTS', s) == 0 then s, ends = other, false end
  if ends then fields[#fields + 1] = '~closed L:0 u' end
  local values = #fields > 0 and redis.call('HMGET', s, unpack(fields)) or {}
  if ends and values[#fields] then
    return answer('CLOSED', cmsgpack.pack({{string.sub(s, #tag + 3), '', '', '0', '0', '0'}, {}}))
  end
  if #mine > 0 then
    for j, row in ipairs(mine) do
      row.s, row.used, row.held = s, values[2 * j - 1], values[2 * j]
      if row.ask then
        -- Two scopes that share other~ count twice there: the second one finds what the first may take gone.
        row.key = s .. ' ' .. row.base
        twice[row.key] = (twice[row.key] or -1) + 1
      end
      row.hi, row.lo = available(row.limit, row.used, row.held)
      if row.ask and twice[row.key] > 0 then
        local hi, lo = limbs(row.ask.ask)
        row.hi, row.lo = normal(row.hi - hi * twice[row.key], row.lo - lo * twice[row.key])
      end
      watched = watched or not row.ask
      rows[#rows + 1] = row
    end
  end
end
local staleness_max = tonumber(policy[5] or '') or 30
if watched and now_ms - found.log > staleness_max * 1000 then return answer('STALE') end

local least, told = nil, {}
for j, row in ipairs(rows) do
  told[j] = {string.sub(row.s, #tag + 3), row.base, row.stop and whole(row.stop) or '', row.limit, '', '0'}
  local hi, lo = limbs(row.ask and row.ask.least or '1') -- a meter that is not asked for must not be used up
  if below(row.hi, row.lo, hi, lo) and (not least or below(row.hi, row.lo, rows[least].hi, rows[least].lo)) then
    least = j
  end
end
if least then
  for j, row in ipairs(rows) do told[j][5] = decimal(row.hi, row.lo) end
  return answer('DENY', cmsgpack.pack({told[least], told}))
end

for meter, ask in pairs(asked) do
  local hi, lo = limbs(ask.ask)
  for _, row in ipairs(rows) do
    if row.meter == meter and below(row.hi, row.lo, hi, lo) then hi, lo = row.hi, row.lo end
  end
  grant[meter] = decimal(hi, lo)
end

local record, exists = {account, call}, {}
for j, row in ipairs(rows) do
  local units = row.ask and grant[row.meter] or '0'
  local hi, lo = limbs(units)
  told[j][5], told[j][6] = decimal(normal(row.hi - hi, row.lo - lo)), units
  if row.ask then
    if exists[row.s] == nil then
      exists[row.s] = true
      if row.s ~= other and not (row.used or row.held) then made_by_gate(n, row.s, told[j][1], account) end
    end
    redis.call('HINCRBY', row.s, row.base .. ' h', units)
    if row.stop and (not row.held or row.stop - at > 31 * 86400) then
      redis.call('ZADD', fx, 'GT', whole(row.stop), told[j][1] .. ' ' .. row.base)
    end
    local r = #record
    record[r + 1], record[r + 2], record[r + 3] = told[j][1], row.base, units
  end
end
local expires = whole(now_ms + tonumber(ARGV[5]))
local granted = {}
for meter, units in pairs(grant) do granted[#granted + 1], granted[#granted + 2] = meter, units end
redis.call('HSET', h, 'st', 'H', 'exp', expires, 'r', cmsgpack.pack(record))
redis.call('ZADD', hx, whole(tonumber(expires) + tonumber(ARGV[6])), hold)
local earlier = cmsgpack.pack({fingerprint, hold, at_us, expires, granted, told})
redis.call('SET', i, earlier, 'PX', whole(math.max(3600000, tonumber(ARGV[5]))))
counted(g, gate, found)
return answer('OK', earlier)
