"""What an event has where the service does not say."""

from collections.abc import Callable
from typing import Any

from tollway.schemas.ids import uuid7_hex

_ONE_CALL = {"calls": 1}


def complete(fields: dict[str, Any], now_us: int, random_bits: Callable[[int], int]) -> None:
    """Fill in, where missing: event_id (UUIDv7), occurred_at (now), and one call among the quantities."""
    if fields.get("event_id") is None:
        fields["event_id"] = uuid7_hex(now_us // 1000, random_bits(74))
    if fields.get("occurred_at") is None:
        fields["occurred_at"] = now_us
    quantities = fields.get("quantities")
    if quantities is None:
        fields["quantities"] = _ONE_CALL
    elif quantities.__class__ is dict and "calls" not in quantities:
        fields["quantities"] = {**_ONE_CALL, **quantities}
