"""account → lane → partition: one fixed number an account, whatever the log's partition count."""

LANES = 256
"""Fixed for ever: partition counts are powers of two ≤ 256, so `lane mod P` is where any murmur2 client sends the key."""

_CACHE_MAX = 100_000  # accounts; cleared whole when full: a miss costs a microsecond
_cache: dict[str, int] = {}


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 of `data`, as an unsigned 32-bit number (the Java client's default partitioner)."""
    length = len(data)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0x5BD1E995 & 0xFFFFFFFF
        h = (h * 0x5BD1E995 & 0xFFFFFFFF) ^ ((k ^ k >> 24) * 0x5BD1E995 & 0xFFFFFFFF)
    if whole != length:
        h = (h ^ int.from_bytes(data[whole:], "little")) * 0x5BD1E995 & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0x5BD1E995 & 0xFFFFFFFF
    return h ^ h >> 15


def lane(account: str) -> int:
    """Lane 0 … 255 of an account (design §2): (murmur2(account) & 0x7fffffff) mod 256."""
    found = _cache.get(account)
    if found is None:
        if len(_cache) >= _CACHE_MAX:
            _cache.clear()
        found = _cache[account] = (murmur2(account.encode()) & 0x7FFFFFFF) % LANES
    return found


def partition(lane: int, partitions: int) -> int:
    """Partition of a lane. `partitions` is a power of two ≤ 256; anything else raises ValueError."""
    if partitions < 1 or partitions > LANES or partitions & (partitions - 1):
        raise ValueError(f"partitions is {partitions}: give a power of two from 1 to {LANES}")
    return lane % partitions


def tag(lane: int) -> str:
    """Redis hash tag of a lane with its prefix: `tw:{042}:`, one cluster slot a lane."""
    return f"tw:{{{lane:03d}}}:"
