"""Command v1: the signed changes that stand in the same log as usage, and what each kind's body must hold (design §4)."""

import json
from dataclasses import dataclass
from typing import Any

from tollway.schemas.topics import BROADCAST
from tollway.schemas.usage import ID, METER, MONEY_NANO_MAX

HEADER_SIGNATURE = "sig"
HEADER_KEY = "kid"
SIGNED_WITHIN_S = 600
"""|append − signed_at| beyond this is refused: a copied command cannot be replayed later."""
REMEMBERED_S = 35 * 86_400

WINDOWS = ("m", "h", "d", "M", "L")
SCOPE_KINDS = ("acct", "user", "client", "anon", "agent", "sess", "run")
PRINCIPAL = "principal"
"""In a policy: the scope kind of whoever called (user, client or anon)."""
OUTAGES = ("closed", "open", "lease")
LIMIT_MAX = 9 * 10**18
METERS_COUNTED_MAX = 32
LIMITS_MAX = 1_000

DEFAULT_POLICY: dict[str, Any] = {
    "counts": [{"meter": "calls", "windows": ["m", "h", "d", "M"], "scopes": ["acct", PRINCIPAL]}],
    "limits": [],
    "outage": "closed",
    "max_staleness_s": 30,
}


class CommandError(ValueError):
    """A command's body is not what its kind needs; the message names field, value and cure."""


@dataclass(frozen=True)
class LogConfig:
    """The log's configuration, fixed when its topic is created: the body of `log.open` (design §4)."""

    epoch: str
    deployment: str
    kid: str
    public_key: str
    lanes: int = 256
    step_s: int = 5
    billing_window_s: int = 3600
    billing_grace_s: int = 600
    snapshot_s: int = 86_400
    hold_grace_s: int = 900
    auto_open: bool = False

    def body(self) -> dict[str, Any]:
        """As the body of `log.open`."""
        return dict(self.__dict__)


def check_body(kind: str, account: str, body: dict[str, Any]) -> None:
    """Refuse a command that the fold would refuse. Raises CommandError naming field, value and cure.

    Kinds: log.open, key.add, meter.add, price.add (broadcast); account.open, customer.bind, policy.set (an account's).
    """
    rule = _RULES.get(kind)
    if rule is None:
        raise CommandError(f"kind is {kind!r}: give one of {', '.join(sorted(_RULES))}")
    broadcast, check = rule
    if broadcast != (account == BROADCAST):
        raise CommandError(f"account is {account!r}: {kind} takes {'`*`' if broadcast else 'one account'}")
    if not broadcast and not ID.fullmatch(account):
        raise CommandError(f"account is {account!r}: ids match {ID.pattern}")
    check(body)


def parse_body(text: str) -> dict[str, Any]:
    """The JSON object of a command's body. Raises CommandError."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise CommandError(f"body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise CommandError(f"body is {type(body).__name__}: give a JSON object")
    return body


def body_text(body: dict[str, Any]) -> str:
    """Canonical JSON of a body: equal bodies have equal bytes."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _log_open(body: dict[str, Any]) -> None:
    try:
        config = LogConfig(**body)
    except TypeError as error:
        raise CommandError(f"log.open: {error}") from error
    for name in ("step_s", "billing_window_s", "snapshot_s"):
        _positive(body, name)
    if 3600 % config.billing_window_s:
        raise CommandError(f"billing_window_s is {config.billing_window_s}: it must divide 3600")


def _key_add(body: dict[str, Any]) -> None:
    _text(body, "kid")
    if len(_text(body, "public_key")) != 64:
        raise CommandError("public_key: give the 32 bytes of an Ed25519 public key as 64 hex digits")


def _meter_add(body: dict[str, Any]) -> None:
    _meter(body, "meter")
    name = body.get("event_name")
    if name is not None and not (isinstance(name, str) and 1 <= len(name) <= 100):
        raise CommandError(f"event_name is {name!r}: give Stripe's event name (1 to 100 characters) or null")


def _price_add(body: dict[str, Any]) -> None:
    if not ID.fullmatch(_text(body, "price_ref")):
        raise CommandError(f"price_ref is {body['price_ref']!r}: ids match {ID.pattern}")
    _text(body, "asset")
    units = body.get("unit_nano")
    if not isinstance(units, dict) or not units:
        raise CommandError(f"unit_nano is {units!r}: give meter → nano units a unit")
    for meter, nano in units.items():
        _meter({"unit_nano": meter}, "unit_nano")
        if not isinstance(nano, int) or not 0 <= nano <= MONEY_NANO_MAX:
            raise CommandError(f"unit_nano.{meter} is {nano!r}: give a whole number from 0 to {MONEY_NANO_MAX}")


def _account_open(body: dict[str, Any]) -> None:
    if "name" in body:
        _text(body, "name")


def _customer_bind(body: dict[str, Any]) -> None:
    if not ID.fullmatch(_text(body, "customer")):
        raise CommandError(f"customer is {body['customer']!r}: give Stripe's customer id, such as cus_123")


def _policy_set(body: dict[str, Any]) -> None:
    counts, limits = body.get("counts"), body.get("limits", [])
    if not isinstance(counts, list) or len(counts) > METERS_COUNTED_MAX:
        raise CommandError(
            f"counts is {counts!r}: give a list of at most {METERS_COUNTED_MAX} of meter, windows, scopes"
        )
    for row in counts:
        _meter(row, "meter")
        _subset(row, "windows", WINDOWS)
        _subset(row, "scopes", (*SCOPE_KINDS, PRINCIPAL))
    if not isinstance(limits, list) or len(limits) > LIMITS_MAX:
        raise CommandError(f"limits: give a list of at most {LIMITS_MAX}")
    for row in limits:
        _meter(row, "meter")
        _subset({"window": [row.get("window")]}, "window", WINDOWS)
        scope = str(row.get("scope"))
        kind, _, rest = scope.partition(":")
        if kind not in (*SCOPE_KINDS, PRINCIPAL) or (rest and not ID.fullmatch(rest)):
            raise CommandError(f"limits.scope is {scope!r}: give a kind ({', '.join(SCOPE_KINDS)}) or kind:id")
        if not isinstance(row.get("limit"), int) or not 0 <= row["limit"] <= LIMIT_MAX:
            raise CommandError(f"limits.limit is {row.get('limit')!r}: give a whole number from 0 to {LIMIT_MAX}")
    if body.get("outage", "closed") not in OUTAGES:
        raise CommandError(f"outage is {body['outage']!r}: give one of {', '.join(OUTAGES)}")
    if "max_staleness_s" in body:
        _positive(body, "max_staleness_s")


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{name} is {value!r}: give a text")
    return value


def _positive(body: dict[str, Any], name: str) -> None:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CommandError(f"{name} is {value!r}: give a whole number of 1 or more")


def _meter(row: object, name: str) -> None:
    value = row.get(name) if isinstance(row, dict) else row
    if not isinstance(value, str) or not METER.fullmatch(value):
        raise CommandError(f"{name} is {value!r}: meters match {METER.pattern}")


def _subset(row: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    values = row.get(name)
    if not isinstance(values, list) or not values or any(value not in allowed for value in values):
        raise CommandError(f"{name} is {values!r}: give some of {', '.join(allowed)}")


_RULES = {
    "log.open": (True, _log_open),
    "key.add": (True, _key_add),
    "meter.add": (True, _meter_add),
    "price.add": (True, _price_add),
    "account.open": (False, _account_open),
    "customer.bind": (False, _customer_bind),
    "policy.set": (False, _policy_set),
}
KINDS = tuple(_RULES)
