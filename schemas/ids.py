"""UUIDv7 from a clock and a source of randomness that the caller gives (RFC 9562 §5.7)."""


def uuid7_hex(at_ms: int, random_bits: int) -> str:
    """32 hex digits: 48 bits of milliseconds since 1970, version, variant, and 74 of `random_bits`."""
    high = at_ms & 0xFFFFFFFFFFFF
    a = random_bits >> 62 & 0xFFF
    b = random_bits & 0x3FFFFFFFFFFFFFFF
    return f"{high << 80 | 0x7 << 76 | a << 64 | 0b10 << 62 | b:032x}"


def born_ms(uuid_hex: str) -> int:
    """Milliseconds since 1970 at which a UUIDv7 was minted."""
    return int(uuid_hex[:12], 16)
