"""The bars: what each figure must be, whether it is, and what limits it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One figure of one part's JSON beside its bar; `least` = it must be at least that, else at most."""

    what: str
    part: str
    read: Callable[[Found], float]
    bar: float
    least: bool
    unit: str
    limit: str
    """What the profile says."""

    def met(self, found: Found) -> bool:
        value = self.read(found)
        return value >= self.bar if self.least else value <= self.bar


def at(*path: str) -> Callable[[Found], float]:
    """The figure at a path of keys."""

    def read(found: Found) -> float:
        here: Any = found
        for key in path:
            here = here[key]
        return float(here)

    return read


def slowest(found: Found) -> float:
    """Of the six questions."""
    return float(max(found["queries_ms"].values()))


def growth(found: Found) -> float:
    """Of the lag of the group whose grows most."""
    return float(max(series["growth_a_second"] for series in found["live"]["lag_s"].values()))


def decisions(found: Found) -> float:
    """A second: authorize and capture are a decision each."""
    return 2 * float(found["authorize + capture"]["a_second"])


def times_incr(found: Found) -> float:
    """authorize's p99 by that of a plain INCR under the same load."""
    return float(found["authorize"]["p99_ms"] / found["INCR"]["p99_ms"])


FETCH = "decoding with its copies, quota, and fetching (aiokafka, one object of C a record): no single hot place (decisions 0011, 0012)"
NEW_KEYS = "each event makes new keys: their strings, their place in the tables, and two new fields in Redis"
TWO_CORES = "the cores: broker, Valkey, ClickHouse and producers take theirs of the same two"
ENGINE = "ClickHouse's engine: compressing and sorting, and its merges meanwhile"
READ_ALL = "it reads every row of the period, and FINAL merges parts while it reads"

BARS = (
    Bar("accounts group, times Quix Streams", "fold", at("times", "quix"), 10, True, "×", FETCH),
    Bar("… times Bytewax", "fold", at("times", "bytewax"), 4, True, "×", FETCH),
    Bar("… times the plain loop", "fold", at("times", "plain"), 2.5, True, "×", FETCH),
    Bar("all groups, draining", "groups", at("drain", "per_s"), 60_000, True, "events/s", TWO_CORES),
    Bar("all groups, live", "groups", at("live", "per_s"), 40_000, True, "events/s", TWO_CORES),
    Bar("… their lag grows by", "groups", growth, 0.01, False, "s a second", TWO_CORES),
    Bar("audit group, consumer", "audit", at("median", "consumer_per_cpu_s"), 150_000, True, "per CPU s", FETCH),
    Bar("… ClickHouse's engine", "audit", at("median", "server_per_cpu_s"), 55_000, True, "per CPU s", ENGINE),
    Bar("… wall", "audit", at("median", "per_s"), 50_000, True, "events/s", ENGINE),
    Bar("… both tables on disk", "audit", at("disk_optimised", "both"), 160, False, "bytes an event",
        "four random ids an event, 64 bytes that nothing compresses, stand in both tables"),
    Bar("slowest of six queries, 1 M rows", "audit", slowest, 150, False, "ms", READ_ALL),
    Bar("slowest of six queries, 10 M rows", "audit_10m", slowest, 1_500, False, "ms", READ_ALL),
    Bar("audit verify, 1 M", "audit", at("verify", "whole_s"), 2, False, "s",
        "decoding and judging each record again, and comparing every column; the log alone is `log_s`"),
    Bar("acknowledged → visible in Redis, p99", "latency", at("p99_ms"), 250, False, "ms",
        "two paces: a turn of the fold each 100 ms, a turn of the view each 50 ms"),
    Bar("Valkey under apply at 50,000 events/s", "apply", at("alone", "valkey_core"), 35, False, "% of a core",
        "one HSET of absolute totals a scope; writing them to the append-only file"),
    Bar("a gate beside it, p50", "apply", at("gate_p50_ms"), 0.5, False, "ms", "a round trip, redis-py's part in Python"),
    Bar("… p99", "apply", at("gate_p99_ms"), 5, False, "ms", "waiting behind a flight of eight calls, and for a core"),
    Bar("50 callers of a gate, five scopes, beside 20,000 applied/s", "gate", decisions, 5_000, True, "decisions/s",
        "one Python process of callers and Valkey, half of each pair's time in each, beside the fold on the same two cores"),
    Bar("… authorize's p99, times a plain INCR's", "gate", times_incr, 3, False, "×", "waiting: all callers ask at once"),
    Bar("ASGI middleware adds, metering, p50", "asgi", at("median", "metered_added_p50_us"), 150, False, "µs",
        "building the event and one write(2)"),
    Bar("… and a gate's call, p50", "asgi", at("median", "gated_added_p50_us"), 1_000, False, "µs",
        "one round trip, and the decision as values"),
    Bar("emit() at 20,000/s, p50", "emit", at("median", "20000", "p50_us"), 20, False, "µs",
        "encoding, and one write(2) to the spool"),
    Bar("… p99", "emit", at("median", "20000", "p99_us"), 100, False, "µs", "the sender's turns in the same loop"),
    Bar("… all CPU", "emit", at("median", "20000", "cpu_us_an_event"), 30, False, "µs an event",
        "emit(), the sender, and waking two hundred times a second"),
    Bar("the sender", "emit", at("median", "sender", "per_cpu_s"), 300_000, True, "per CPU s",
        "reading the spool, and aiokafka's batch builder, record by record"),
    Bar("recovery of a million keys, first effect", "million", at("recovery", "first_effect_s"), 5, False, "s",
        "importing and joining the group; then loading the checkpoints"),
    Bar("memory", "million", at("bytes_a_key"), 400, False, "bytes a key", "key strings, and an index over them"),
)  # fmt: skip
