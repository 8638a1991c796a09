"""Command v1: the signed changes that stand in the same log as usage, and what each kind's body must hold (design §4)."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tollway.schemas.lane import LANES
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
BINDINGS_MAX = 10_000
"""Principals bound to one account, those unbound within the last 35 days among them."""
BOUND_SCOPES_MAX = 4
OPERATIONS_MAX = 64
TEXT_MAX = 256
PRINCIPAL_KINDS = ("user", "client")
BOUND_SCOPES = ("agent",)
"""Scope kinds that a principal may be bound to; its account and its own scope are always there."""
SECONDS_MAX = 366 * 86_400
FOLD_VERSION_MAX = 1_000_000

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
    origin: str = ""
    """Epoch of the first log, where this one has grown from it: meter events go on under that one."""

    def body(self) -> dict[str, Any]:
        """As the body of `log.open`."""
        return dict(self.__dict__)


def check_body(kind: str, account: str, body: dict[str, Any]) -> None:
    """Refuse a command that the fold would refuse. Raises CommandError naming field, value and cure.

    Kinds: log.open, key.add, meter.add, price.add, fold.change (broadcast); an account's: account.open, account.freeze,
    account.unfreeze, customer.bind, policy.set, principal.bind, principal.unbind, run.close, session.close. rail.event is
    an account's, or everybody's where it concerns no account.
    """
    rule = _RULES.get(kind)
    if rule is None:
        raise CommandError(f"kind is {kind!r}: give one of {', '.join(sorted(_RULES))}")
    broadcast, fields, check = rule
    if broadcast not in (None, account == BROADCAST):
        raise CommandError(f"account is {account!r}: {kind} takes {'`*`' if broadcast else 'one account'}")
    if account != BROADCAST and not ID.fullmatch(account):
        raise CommandError(f"account is {account!r}: ids match {ID.pattern}")
    if unknown := sorted(body.keys() - set(fields)):
        raise CommandError(f"{unknown[0]} is no field of {kind}: give {', '.join(fields)}")
    check(body)


def parse_body(text: str) -> dict[str, Any]:
    """The JSON object of a command's body. Raises CommandError."""
    try:
        body = json.loads(text)
        body_text(body).encode()  # a lone surrogate passes the parser and no store behind it
    except (ValueError, RecursionError) as error:
        raise CommandError(f"body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise CommandError(f"body is {type(body).__name__}: give a JSON object")
    return body


def body_text(body: dict[str, Any]) -> str:
    """Canonical JSON of a body: equal bodies have equal bytes."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _log_open(body: dict[str, Any]) -> None:
    for name in ("epoch", "deployment", "kid"):
        _text(body, name)
    _public_key(body)
    config = LogConfig(**body)
    given = config.body()
    if not isinstance(config.origin, str):
        raise CommandError(f"origin is {config.origin!r}: give the epoch of the first log, or nothing")
    if config.lanes != LANES:
        raise CommandError(f"lanes is {config.lanes!r}: give {LANES}, it is fixed")
    for name in ("step_s", "billing_window_s", "snapshot_s"):
        _whole(given, name, 1, SECONDS_MAX)
    for name in ("billing_grace_s", "hold_grace_s"):
        _whole(given, name, 0, SECONDS_MAX)
    if 3600 % config.billing_window_s:
        raise CommandError(f"billing_window_s is {config.billing_window_s}: it must divide 3600")
    if not isinstance(config.auto_open, bool):
        raise CommandError(f"auto_open is {config.auto_open!r}: give true or false")


def _key_add(body: dict[str, Any]) -> None:
    _text(body, "kid")
    _public_key(body)


def _public_key(body: dict[str, Any]) -> None:
    if not _KEY_HEX.fullmatch(_text(body, "public_key")):
        raise CommandError(
            f"public_key is {body['public_key']!r}: give the 32 bytes of an Ed25519 public key as 64 hex digits"
        )


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
    for meter in units:
        _meter({"unit_nano": meter}, "unit_nano")
        _whole(units, meter, 0, MONEY_NANO_MAX, "unit_nano.")


def _fold_change(body: dict[str, Any]) -> None:
    _whole(body, "version", 2, FOLD_VERSION_MAX)
    _whole(body, "at_s", 0, 2**40)


def _account_open(body: dict[str, Any]) -> None:
    if "name" in body:
        _text(body, "name")


def _customer_bind(body: dict[str, Any]) -> None:
    if not ID.fullmatch(_text(body, "customer")):
        raise CommandError(f"customer is {body['customer']!r}: give Stripe's customer id, such as cus_123")


def _reason(body: dict[str, Any]) -> None:
    if "reason" in body:
        _short(body, "reason")


def _principal(body: dict[str, Any]) -> None:
    """Whose token: the issuer's `iss`, and the `sub` of a user or the `client_id` of a client."""
    _short(body, "issuer")
    if body.get("kind") not in PRINCIPAL_KINDS:
        raise CommandError(f"kind is {body.get('kind')!r}: give one of {', '.join(PRINCIPAL_KINDS)}")
    _short(body, "subject")


def _principal_bind(body: dict[str, Any]) -> None:
    _principal(body)
    if not ID.fullmatch(_text(body, "principal")):
        raise CommandError(f"principal is {body['principal']!r}: ids match {ID.pattern}")
    for scope in _texts(body, "scopes", BOUND_SCOPES_MAX):
        kind, _, name = scope.partition(":")
        if kind not in BOUND_SCOPES or not ID.fullmatch(name):
            raise CommandError(f"scopes has {scope!r}: give {' or '.join(BOUND_SCOPES)}:id, such as agent:helpdesk")
    for operation in _texts(body, "operations", OPERATIONS_MAX):
        if not _OPERATIONS.fullmatch(operation):
            raise CommandError(f"operations has {operation!r}: give an operation's name, or its beginning and *")


def _rail_event(body: dict[str, Any]) -> None:
    for name in ("rail", "event_id", "type"):
        _short(body, name)
    _whole(body, "created_s", 0, 2**40)
    for name in ("customer", "object_id"):
        if body.get(name) is not None:
            _short(body, name)
    if not isinstance(body.get("object"), dict | None):
        raise CommandError(
            f"object is {type(body['object']).__name__}: give the event's object, or null where it is large"
        )


def _ended(name: str) -> Callable[[dict[str, Any]], None]:
    def check(body: dict[str, Any]) -> None:
        if not ID.fullmatch(_text(body, name)):
            raise CommandError(f"{name} is {body[name]!r}: ids match {ID.pattern}")

    return check


def _policy_set(body: dict[str, Any]) -> None:
    for row in _rows(body, "counts", METERS_COUNTED_MAX, "meter, windows, scopes", required=True):
        _meter(row, "meter")
        _subset(row, "windows", WINDOWS)
        _subset(row, "scopes", (*SCOPE_KINDS, PRINCIPAL))
    for row in _rows(body, "limits", LIMITS_MAX, "scope, meter, window, limit"):
        _limit(row)
    if "outage" in body and body["outage"] not in OUTAGES:
        raise CommandError(f"outage is {body['outage']!r}: give one of {', '.join(OUTAGES)}")
    if "max_staleness_s" in body:
        _whole(body, "max_staleness_s", 1, SECONDS_MAX)


def _limit(row: dict[str, Any]) -> None:
    _meter(row, "meter")
    if row.get("window") not in WINDOWS:
        raise CommandError(f"window is {row.get('window')!r}: give one of {', '.join(WINDOWS)}")
    scope = row.get("scope")
    kind, colon, rest = scope.partition(":") if isinstance(scope, str) else ("", "", "")
    named = kind in SCOPE_KINDS and kind != "acct" and bool(ID.fullmatch(rest))
    if not (named if colon else kind in (*SCOPE_KINDS, PRINCIPAL)):
        raise CommandError(
            f"scope is {scope!r}: give a kind ({', '.join((*SCOPE_KINDS, PRINCIPAL))}) or kind:id, such as user:u1"
        )
    _whole(row, "limit", 0, LIMIT_MAX)


def _rows(body: dict[str, Any], name: str, most: int, parts: str, required: bool = False) -> list[dict[str, Any]]:
    """A list of objects of exactly these parts."""
    rows = body.get(name, None if required else [])
    if not isinstance(rows, list) or len(rows) > most:
        shown = f"{len(rows)} long" if isinstance(rows, list) else repr(rows)
        raise CommandError(f"{name} is {shown}: give a list of at most {most}, each {parts}")
    for row in rows:
        if not isinstance(row, dict) or row.keys() != set(parts.split(", ")):
            raise CommandError(f"{name} has {row!r}: each row has {parts}")
    return rows


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{name} is {value!r}: give a text")
    return value


def _short(body: dict[str, Any], name: str) -> None:
    if len(_text(body, name)) > TEXT_MAX:
        raise CommandError(f"{name} is {len(body[name])} characters long: give at most {TEXT_MAX}")


def _texts(body: dict[str, Any], name: str, most: int) -> list[str]:
    values = body.get(name, [])
    if not isinstance(values, list) or len(values) > most or any(not isinstance(value, str) for value in values):
        raise CommandError(f"{name} is {values!r}: give a list of at most {most} texts")
    return values


def _whole(body: dict[str, Any], name: str, least: int, most: int, prefix: str = "") -> None:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CommandError(f"{prefix}{name} is {value!r}: give a whole number from {least} to {most}")


def _meter(row: dict[str, Any], name: str) -> None:
    value = row.get(name)
    if not isinstance(value, str) or not METER.fullmatch(value):
        raise CommandError(f"{name} is {value!r}: meters match {METER.pattern}")


def _subset(row: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    values = row.get(name)
    if not isinstance(values, list) or not values or any(value not in allowed for value in values):
        raise CommandError(f"{name} is {values!r}: give some of {', '.join(allowed)}")


_KEY_HEX = re.compile(r"[0-9a-f]{64}")
_OPERATIONS = re.compile(r"[^\x00-\x1f*]{0,127}[^\x00-\x1f]")

# kind → (broadcast, None = either way; fields of the body; check)
_RULES: dict[str, tuple[bool | None, tuple[str, ...], Callable[[dict[str, Any]], None]]] = {
    "log.open": (True, tuple(LogConfig.__annotations__), _log_open),
    "key.add": (True, ("kid", "public_key"), _key_add),
    "meter.add": (True, ("meter", "event_name"), _meter_add),
    "price.add": (True, ("price_ref", "asset", "unit_nano"), _price_add),
    "fold.change": (True, ("version", "at_s"), _fold_change),
    "account.open": (False, ("name",), _account_open),
    "account.freeze": (False, ("reason",), _reason),
    "account.unfreeze": (False, ("reason",), _reason),
    "customer.bind": (False, ("customer",), _customer_bind),
    "policy.set": (False, tuple(DEFAULT_POLICY), _policy_set),
    "principal.bind": (False, ("issuer", "kind", "subject", "principal", "scopes", "operations"), _principal_bind),
    "principal.unbind": (False, ("issuer", "kind", "subject"), _principal),
    "rail.event": (None, ("rail", "event_id", "type", "created_s", "customer", "object_id", "object"), _rail_event),
    "run.close": (False, ("run",), _ended("run")),
    "session.close": (False, ("session",), _ended("session")),
}
KINDS = tuple(_RULES)
