-- The same records as columns, with their verdict: what analysts read, through the view `usage`.
-- '' stands for null; what could not be decoded is '', 0, 1970, [] or {} (kind says so); `command` is an accepted one's JSON.
CREATE TABLE IF NOT EXISTS usage_events
(
    epoch LowCardinality(String),
    kafka_partition UInt16 CODEC(T64, ZSTD(1)),
    kafka_offset UInt64 CODEC(Delta, ZSTD(1)),
    append_time DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    kind LowCardinality(String),
    record_key LowCardinality(String),
    schema_id UInt32 CODEC(ZSTD(1)),
    verdict LowCardinality(String),
    reason LowCardinality(String),
    clock_ahead Bool,
    command String CODEC(ZSTD(1)),
    event_id String CODEC(ZSTD(1)),
    source LowCardinality(String),
    sequence Int64 CODEC(Delta, ZSTD(1)),
    occurred_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
    surface LowCardinality(String),
    operation LowCardinality(String),
    account LowCardinality(String),
    principal_kind LowCardinality(String),
    principal String CODEC(ZSTD(1)),
    status LowCardinality(String),
    latency_us Int64 CODEC(T64, ZSTD(1)),
    quantities Map(LowCardinality(String), Int64),
    agent LowCardinality(String),
    session String CODEC(ZSTD(1)),
    run String CODEC(ZSTD(1)),
    parent String CODEC(ZSTD(1)),
    path Array(String) CODEC(ZSTD(1)),
    hold String CODEC(ZSTD(1)),
    rail LowCardinality(String),
    price_ref LowCardinality(String),
    revenue_nano Nullable(Int64) CODEC(T64, ZSTD(1)),
    revenue_asset LowCardinality(String),
    cost_nano Nullable(Int64) CODEC(T64, ZSTD(1)),
    cost_asset LowCardinality(String),
    payment_ref String CODEC(ZSTD(1)),
    provider LowCardinality(String),
    model LowCardinality(String),
    trace_id String CODEC(ZSTD(1)),
    attributes Map(LowCardinality(String), String)
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(append_time)
PRIMARY KEY (record_key, append_time)
ORDER BY (record_key, append_time, epoch, kafka_partition, kafka_offset)
SETTINGS non_replicated_deduplication_window = 10000;
