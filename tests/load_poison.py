"""Records that must become dead letters, one fault each, with the reason's name; built from the schema files alone."""

import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.load import DAY_US, priced
from tests.oracle_wire import COMMAND_ID, USAGE_ID, frame, lane

HOLES_MAX = 1_000
Sign = Callable[[bytes], list[tuple[str, bytes]]]
"""value → headers of a good signature."""


@dataclass(frozen=True)
class Raw:
    """One record to write as it is. `want` = accepted, duplicate or a dead letter's reason."""

    want: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    off_by: int = 0
    """Partitions to the side of where it belongs."""
    tag: str = ""


def source_id(born_ms: int, salt: int) -> str:
    """A UUIDv7 in hex, born when we say."""
    return f"{born_ms << 80 | 7 << 76 | (salt >> 62 & 0xFFF) << 64 | 2 << 62 | salt & (2**62 - 1):032x}"


class Forge:
    """Makes whole usage records for one account, each with a source of its own unless told otherwise."""

    def __init__(self, account: str, now_us: int) -> None:
        self.account, self.now_us, self.made = account, now_us, 0

    def source(self, age_us: int = 0) -> str:
        return source_id((self.now_us - age_us) // 1000, uuid.uuid4().int)

    def usage(self, **changes: Any) -> dict[str, Any]:
        self.made += 1
        fields = dict.fromkeys(("agent", "session", "run", "parent", "path", "hold", "rail", "price_ref"))
        fields |= dict.fromkeys(("revenue_nano", "revenue_asset", "cost_nano", "cost_asset", "payment_ref"))
        fields |= dict.fromkeys(("provider", "model", "attributes"))
        return {
            **fields,
            "event_id": uuid.uuid4().hex,
            "source": self.source(),
            "sequence": 1,
            "occurred_at": self.now_us,
            "surface": "rest",
            "operation": "poison.cabinet",
            "account": self.account,
            "principal_kind": "user",
            "principal": "eve",
            "status": "ok",
            "latency_us": 5,
            "quantities": {"calls": 1},
            "trace_id": f"forged.{self.account}.{self.made}",
            **changes,
        }

    def raw(self, want: str, **changes: Any) -> Raw:
        event = self.usage(**changes)
        return Raw(want, self.account.encode(), frame(USAGE_ID, event), tag=event["trace_id"])


def poisons(account: str, stranger: str, now_us: int, sign: Sign, forged: Sign) -> list[Raw]:
    """Every reason at least once. `stranger` is an account that nobody opened, `forged` signs with another key."""
    forge = Forge(account, now_us)
    return [
        *_broken_bytes(forge),
        *_broken_content(forge),
        *_broken_context(forge, stranger),
        *_broken_commands(forge, sign, forged),
    ]


def _broken_bytes(forge: Forge) -> list[Raw]:
    key, good = forge.account.encode(), frame(USAGE_ID, forge.usage(operation="operation-to-break"))
    latin = good.replace(b"operation-to-break", b"operation-\xff\xfe-break")
    twice = good.replace(b"\x02\x0acalls\x02\x00", b"\x04\x0acalls\x02\x0acalls\x04\x00")
    if twice == good or latin == good:
        raise AssertionError("the encoding of the record to break has changed")
    return [
        Raw("empty", key, b""),
        Raw("empty", key, None),
        Raw("oversized", key, good + b"\0" * 70_000),
        Raw("bad_framing", key, b"{\"calls\": 1}"),
        Raw("bad_framing", key, b"\0\0"),
        Raw("unknown_schema", key, b"\0" + struct.pack(">I", 7) + good[5:]),
        Raw("undecodable", key, good[:5] + b"\xff" * 64),
        Raw("undecodable", key, good[: len(good) // 2]),
        Raw("undecodable", key, good[:5]),
        Raw("invalid_utf8", key, latin),
        Raw("duplicate_key", key, twice),
    ]  # fmt: skip


def _broken_content(forge: Forge) -> list[Raw]:
    many = {f"m{number}": 1 for number in range(32)}
    return [
        forge.raw("bad_id", principal="two words"),
        forge.raw("bad_id", principal=""),
        forge.raw("bad_id", source="not-a-uuid"),
        forge.raw("bad_id", run="r" * 129),
        forge.raw("bad_id", path=["ok", "not ok"]),
        forge.raw("bad_id", quantities={"calls": 1, "Bad-Meter": 1}),
        forge.raw("bad_value", surface="fax"),
        forge.raw("bad_value", status="free"),
        forge.raw("bad_value", revenue_nano=5),
        forge.raw("negative", quantities={"calls": -1}),
        forge.raw("negative", latency_us=-1),
        forge.raw("negative", cost_nano=-1, cost_asset="USD"),
        forge.raw("over_bound", quantities={"calls": 10**12 + 1}),
        forge.raw("over_bound", quantities={"calls": 1, **many}),
        forge.raw("over_bound", cost_nano=10**14 + 1, cost_asset="USD"),
        forge.raw("over_bound", attributes={"note": "x" * 257}),
        forge.raw("missing_calls", quantities={"tokens_in": 3}),
        forge.raw("hold_unsequenced", hold="hold-1", sequence=0),
    ]


def _broken_context(forge: Forge, stranger: str) -> list[Raw]:
    good = frame(USAGE_ID, forge.usage())
    lost = Forge(stranger, forge.now_us)
    price = priced({"calls": 1}, "price:std:1")
    return [
        Raw("misrouted", forge.account.encode(), good, off_by=1),
        Raw("misrouted", stranger.encode(), good),
        forge.raw("too_late", occurred_at=forge.now_us - 35 * DAY_US),
        forge.raw("source_expired", source=forge.source(6 * DAY_US)),
        forge.raw("source_ahead", source=forge.source(-2 * DAY_US)),
        lost.raw("unknown_account"),
        forge.raw("unknown_price", price_ref="price:none", revenue_nano=1, revenue_asset="USD"),
        forge.raw("price_mismatch", **{**price, "revenue_nano": price["revenue_nano"] - 1}),
        forge.raw("unsequenced_age", sequence=0, occurred_at=forge.now_us - DAY_US // 12),
    ]


def _broken_commands(forge: Forge, sign: Sign, forged: Sign) -> list[Raw]:
    def command(want: str, headers: Sign, kind: str, body: str, age_us: int = 0) -> Raw:
        value = frame(
            COMMAND_ID,
            {
                "command_id": uuid.uuid4().hex,
                "account": forge.account,
                "kind": kind,
                "body": body,
                "signed_at": forge.now_us - age_us,
            },
        )
        return Raw(want, forge.account.encode(), value, tuple(headers(value)))

    bind = json.dumps({"customer": "cus_of_the_forger"})
    return [
        command("bad_signature", forged, "customer.bind", bind),
        command("bad_signature", lambda _: [], "customer.bind", bind),
        command("bad_signature", lambda value: sign(value + b"!"), "customer.bind", bind),
        command("bad_command", sign, "customer.bind", "no json"),
        command("bad_command", sign, "account.give_money", "{}"),
        command("stale_command", sign, "customer.bind", bind, age_us=20 * 60 * 10**6),
    ]


def closed_hole(account: str, now_us: int) -> list[Raw]:
    """One hole range more than a source may have; then the one that had to close is filled, too late."""
    forge = Forge(account, now_us)
    source = forge.source()
    odd = [forge.raw("accepted", source=source, sequence=2 * number + 1) for number in range(HOLES_MAX + 2)]
    return [*odd, forge.raw("hole_closed", source=source, sequence=2), forge.raw("accepted", source=source, sequence=4)]


def unsequenced(account: str, now_us: int, count: int) -> list[Raw]:
    """Records without a sequence, every third of them twice: told apart by event_id."""
    forge, found = Forge(account, now_us), []
    for number in range(count):
        raw = forge.raw("accepted", sequence=0)
        found.append(raw)
        if number % 3 == 0:
            found.append(Raw("duplicate", raw.key, raw.value))
    return found


def target(raw: Raw, partitions: int) -> int:
    """The partition to write to: the key's, or one beside it."""
    return (lane((raw.key or b"").decode()) + raw.off_by) % partitions
