-- One row a block, written behind its rows. first_append and last_append are the least and greatest append time in it.
CREATE TABLE IF NOT EXISTS audit_manifest
(
    epoch LowCardinality(String),
    kafka_partition UInt16,
    first_offset UInt64 CODEC(Delta, ZSTD(1)),
    last_offset UInt64 CODEC(Delta, ZSTD(1)),
    records UInt32 CODEC(T64, ZSTD(1)),
    block_hash FixedString(32) CODEC(NONE),
    chain_hash FixedString(32) CODEC(NONE),
    first_append DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    last_append DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1))
)
ENGINE = ReplacingMergeTree
ORDER BY (epoch, kafka_partition, first_offset)
SETTINGS non_replicated_deduplication_window = 10000;
