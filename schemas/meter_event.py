"""MeterEvent v1: one delta of billable units, and its identity at Stripe (design §5)."""

import base64
import hashlib
from typing import TypedDict

UNITS_MAX = 999_999_999_999_999
"""Stripe takes 15 significant digits; a larger delta is sent in parts."""


class MeterEvent(TypedDict):
    """Units of one (account, customer, meter, price, usage window), flushed by flush number `flush`."""

    epoch: str
    account: str
    n: int
    deployment: str
    customer: str
    meter: str
    event_name: str
    price_ref: str | None
    window_start_s: int
    flush: int
    part: int
    units: int
    last_occurred_at: int


def identifier(event: MeterEvent) -> str:
    """Stripe's identifier: `tw1_` + base32(SHA-256(identity))[:40], a function of the log alone.

    The identity is (deployment, account, customer, meter, price_ref, usage window start, flush, part); the epoch is not in
    it, so that a log rebuilt under a new topic bills nothing twice.
    """
    identity = "\x1f".join(
        str(part)
        for part in (
            event["deployment"],
            event["account"],
            event["customer"],
            event["meter"],
            event["price_ref"] or "",
            event["window_start_s"],
            event["flush"],
            event["part"],
        )
    )
    return "tw1_" + base64.b32encode(hashlib.sha256(identity.encode()).digest()).decode().lower()[:40]
