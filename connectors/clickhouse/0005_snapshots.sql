-- A sealed snapshot a row: the state of one group's partition where log time crossed day · snapshot_s. state is zstd; hash is
-- SHA-256 of what it unpacks to. The same snapshot always has the same hash, so copies are merged.
CREATE TABLE IF NOT EXISTS snapshots
(
    epoch LowCardinality(String),
    fold_group LowCardinality(String),
    kafka_partition UInt16,
    day UInt64,
    next_offset UInt64,
    log_time DateTime64(3, 'UTC'),
    fold_version UInt32,
    hash FixedString(32) CODEC(NONE),
    state String CODEC(NONE)
)
ENGINE = ReplacingMergeTree
ORDER BY (epoch, fold_group, kafka_partition, day)
SETTINGS non_replicated_deduplication_window = 10000;
