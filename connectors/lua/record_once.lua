-- record_once: an event joins the stream unless its id was here within the horizon.
--
-- KEYS  stream, the event's id
-- ARGV  event (JSON), most events in the stream, horizon (s)
-- gives 1 it is there (now, or before), 0 the stream is full
if redis.call('EXISTS', KEYS[2]) == 1 then return 1 end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('XADD', KEYS[1], '*', 'event', ARGV[1])
redis.call('SET', KEYS[2], '1', 'EX', ARGV[3])
return 1
