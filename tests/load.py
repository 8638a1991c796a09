"""Deterministic traffic: a world of accounts, principals, prices and policies, and the calls that they make, from a seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

DAY_US = 86_400 * 10**6
METERS: dict[str, str | None] = {
    "calls": "tollway_calls",
    "tokens_in": "tollway_tokens_in",
    "tokens_out": "tollway_tokens_out",
    "tool_calls": None,
    "vector_queries": None,
    "compute_ms": None,
}
"""meter → Stripe's event name; None = counted, not billed."""
PRICES = {
    "price:std:1": {"asset": "USD", "unit_nano": {"calls": 1_000_000, "tokens_out": 2_000}},
    "price:eur:1": {"asset": "EUR", "unit_nano": {"calls": 900_000, "tokens_in": 150}},
}
OPERATIONS = ("search.web", "docs.read", "chat.complete", "tools/weather", "embed", "plan", "Übersetzen")
STATUSES = ("ok",) * 90 + ("error",) * 5 + ("denied",) * 2 + ("rate_limited",) * 2 + ("payment_required",)
LATE_SHARE, AHEAD_SHARE = 0.01, 0.003
LATE_MAX_US = 3 * DAY_US - 3_600 * 10**6

EVERYTHING = {
    "counts": [
        {
            "meter": meter,
            "windows": ["m", "h", "d", "M", "L"],
            "scopes": ["acct", "principal", "agent", "sess", "run"],
        }
        for meter in METERS
    ]
}
SOME = {
    "counts": [
        {"meter": "calls", "windows": ["m", "h", "d", "M"], "scopes": ["acct", "principal", "user"]},
        {"meter": "tokens_in", "windows": ["h", "d"], "scopes": ["acct", "user", "client"]},
        {"meter": "compute_ms", "windows": ["L"], "scopes": ["sess", "run", "agent"]},
    ],
    "limits": [{"scope": "principal", "meter": "calls", "window": "d", "limit": 10_000}],
}
TWICE = {
    "counts": [
        {"meter": "tokens_out", "windows": ["M"], "scopes": ["acct"]},
        {"meter": "tokens_out", "windows": ["M", "d"], "scopes": ["acct", "anon"]},
    ]
}
"""Two rows that overlap: a scope is counted once."""


@dataclass(frozen=True)
class Principal:
    account: str
    kind: str
    name: str


@dataclass(frozen=True)
class World:
    """Who there is. `bound` and `late_bound`: account → Stripe customer, from the start or in mid-traffic."""

    accounts: tuple[str, ...]
    principals: tuple[Principal, ...]
    bound: dict[str, str]
    late_bound: dict[str, str]
    policies: dict[str, dict[str, Any]]
    late_policies: dict[str, dict[str, Any]]


def world(seed: int, accounts: int = 220, principals_each: int = 10) -> World:
    """A third of the accounts counts more than the default, a tenth is bound late, a tenth never."""
    names = tuple(f"org-{seed}-{number:04d}" for number in range(accounts))
    kinds = ("user", "user", "user", "client", "anonymous")
    principals = tuple(
        Principal(name, kinds[number % len(kinds)], f"p{number:02d}@{name}")
        for name in names
        for number in range(principals_each)
    )
    bound = {name: f"cus_{name}" for number, name in enumerate(names) if number % 10 < 8}
    late = {name: f"cus_{name}" for number, name in enumerate(names) if number % 10 == 8}
    bodies = {0: EVERYTHING, 1: SOME, 2: TWICE}
    policies = {name: bodies[number % 9] for number, name in enumerate(names) if number % 9 in bodies}
    changed = {name: SOME for number, name in enumerate(names) if number % 9 == 3}
    return World(names, principals, bound, late, policies, changed)


def opening(made: World) -> list[tuple[str, str, dict[str, Any]]]:
    """(account or `*`, kind, body) of every command that stands before the traffic."""
    commands: list[tuple[str, str, dict[str, Any]]] = []
    commands += [("*", "meter.add", {"meter": meter, "event_name": name}) for meter, name in METERS.items()]
    commands += [("*", "price.add", {"price_ref": ref, **price}) for ref, price in PRICES.items()]
    commands += [(name, "account.open", {"name": name.upper()}) for name in made.accounts]
    commands += [(name, "customer.bind", {"customer": customer}) for name, customer in made.bound.items()]
    return commands + [(name, "policy.set", body) for name, body in made.policies.items()]


def midway(made: World) -> list[tuple[str, str, dict[str, Any]]]:
    """Commands that change accounts while they are being used."""
    binds = [(name, "customer.bind", {"customer": customer}) for name, customer in made.late_bound.items()]
    return binds + [(name, "policy.set", body) for name, body in made.late_policies.items()]


def traffic(made: World, seed: int, writer: str, first: int, count: int, of: int) -> Iterator[dict[str, Any]]:
    """`count` calls as `emit()` takes them, but with `age_us` (negative = ahead) where the clock's `occurred_at` belongs.

    Writers take turns through all principals (`first`, `first + of`, …), so that everybody calls; then the busy ones call
    most. The tag in `trace_id` is the writer's name and the call's number.
    """
    random = Random(f"{seed}/{writer}")
    for number in range(count):
        turn = first + number * of
        if turn < len(made.principals):
            principal = made.principals[turn]
        else:
            principal = made.principals[int(len(made.principals) * random.random() ** 3)]
        yield {**_call(random, principal), "trace_id": f"{writer}.{number}"}


def _call(random: Random, who: Principal) -> dict[str, Any]:
    surface = random.choice(("rest", "mcp", "agent", "llm"))
    fields: dict[str, Any] = {
        "account": who.account,
        "principal_kind": who.kind,
        "principal": who.name,
        "surface": surface,
        "operation": random.choice(OPERATIONS),
        "status": random.choice(STATUSES),
        "latency_us": random.randrange(200, 2_000_000),
        "quantities": _quantities(random, surface),
        "age_us": _age_us(random),
    }
    if surface in ("mcp", "agent"):
        fields |= _agent(random, who)
    if random.random() < 0.2:
        reference = random.choice(tuple(PRICES))
        fields |= priced(fields["quantities"], reference)
    if random.random() < 0.3:
        fields |= {"cost_nano": random.randrange(10**7), "cost_asset": "USD"}
    if surface == "llm":
        fields |= {"provider": "example", "model": random.choice(("small-1", "large-2"))}
    if random.random() < 0.03:
        fields |= {"rail": "x402", "payment_ref": f"0x{random.getrandbits(128):032x}"}
    if random.random() < 0.02:
        fields |= {"hold": f"hold-{random.getrandbits(64):016x}"}
    if random.random() < 0.1:
        fields |= {"attributes": {"team": random.choice(("blue", "grün")), "region": "eu"}}
    return fields


def _quantities(random: Random, surface: str) -> dict[str, int]:
    quantities = {"calls": 1 if random.random() < 0.97 else random.randrange(0, 5)}
    if surface in ("llm", "agent"):
        quantities |= {"tokens_in": random.randrange(4_000), "tokens_out": random.randrange(1_500)}
    if surface == "mcp":
        quantities["tool_calls"] = 1
    if random.random() < 0.2:
        quantities |= {"vector_queries": random.randrange(1, 4), "compute_ms": random.randrange(10_000)}
    if random.random() < 0.005:
        quantities["undeclared_units"] = 7  # stored, never counted, never billed
    return quantities


def _agent(random: Random, who: Principal) -> dict[str, Any]:
    run = f"run-{who.name}-{random.randrange(3)}"
    fields: dict[str, Any] = {
        "agent": f"agent-{random.randrange(4)}",
        "session": f"s-{who.name}-{random.randrange(2)}",
        "run": run,
    }
    if random.random() < 0.4:
        fields |= {"run": f"{run}/sub{random.randrange(2)}", "parent": run, "path": [run]}
    return fields


def _age_us(random: Random) -> int:
    roll = random.random()
    if roll < LATE_SHARE:
        return random.randrange(60 * 10**6, LATE_MAX_US)
    if roll < LATE_SHARE + AHEAD_SHARE:
        return -random.choice((20, 3_000)) * 10**6  # within the minute; and beyond it: clamped to append time
    return random.randrange(0, 1_500_000)


def priced(quantities: dict[str, int], reference: str) -> dict[str, Any]:
    """The price fields that the fold will recompute and agree with."""
    price = PRICES[reference]
    due = sum(nano * quantities.get(meter, 0) for meter, nano in price["unit_nano"].items())
    return {"price_ref": reference, "revenue_nano": due, "revenue_asset": price["asset"]}


def emitted_fields(call: dict[str, Any], now_us: int) -> dict[str, Any]:
    """The call as it goes to `emit()`: `age_us` turned into `occurred_at`."""
    fields = dict(call)
    fields["occurred_at"] = now_us - fields.pop("age_us")
    return fields
