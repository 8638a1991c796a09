-- meta: where the lane stands, for gates with open holds. Reads only.
--
-- KEYS  m g     ARGV  gate     gives [word, gen, off, count], word the lane's state or COLD
local found = lane(KEYS[1], KEYS[2], ARGV[1])
return {found.state or 'COLD', found.gen, found.off, found.count}
