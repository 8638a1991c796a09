-- Every record as the broker gave it: the source of verify and of replay. One row an (epoch, partition, offset).
-- Only broker facts stand in sort and partition keys, so that the same record always lies in the same place.
-- NULL in record_key or raw is a null at the broker, '' is empty; headers are msgpack, '' is none.
CREATE TABLE IF NOT EXISTS usage_log
(
    epoch LowCardinality(String),
    kafka_partition UInt16 CODEC(T64, ZSTD(1)),
    kafka_offset UInt64 CODEC(Delta, ZSTD(1)),
    append_time DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    kind LowCardinality(String),
    record_key LowCardinality(Nullable(String)),
    schema_id UInt32 CODEC(ZSTD(1)),
    headers String CODEC(ZSTD(1)),
    raw Nullable(String) CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(append_time)
ORDER BY (epoch, kafka_partition, kafka_offset)
SETTINGS non_replicated_deduplication_window = 10000;
