"""The gated accounts of a crash campaign: their policies, the calls that their services ask for, and what may never be passed."""

import time
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.oracle_book import Book, Total
from tollway.connectors.gate_decision import Ask, scopes_of

TILLS = 4
METER = "tokens_out"
Order = tuple[str, str, dict[str, Any]]
"""Account, kind, body of a command."""
MOST = 20
"""Tokens of one call, at most."""
RUN_S, SESSION_S = 20, 60
"""A new set of runs and sessions begins so often: budgets run out and others open for as long as the campaign lasts."""
LIMITS: dict[tuple[str, str, str], int] = {
    ("acct", "calls", "m"): 400,
    ("user", "calls", "m"): 180,
    ("acct", METER, "d"): 50_000_000,
    ("agent", METER, "d"): 30_000_000,
    ("sess", METER, "L"): 700,
    ("run", METER, "L"): 150,
}
"""(scope kind, meter, window) → limit."""
POLICY: dict[str, Any] = {
    "counts": [
        {"meter": "calls", "windows": ["m"], "scopes": ["acct", "principal"]},
        {"meter": METER, "windows": ["d"], "scopes": ["acct", "agent"]},
        {"meter": METER, "windows": ["L"], "scopes": ["sess", "run"]},
    ],
    "limits": [
        {"scope": kind, "meter": meter, "window": window, "limit": most}
        for (kind, meter, window), most in LIMITS.items()
    ],
    "outage": "closed",
    "max_staleness_s": 3_600,
}


def tills(seed: int) -> list[str]:
    """Their accounts."""
    return [f"till-{seed}-{number}" for number in range(TILLS)]


def opening(seed: int) -> list[Order]:
    """The commands that open them: half of them have a customer."""
    names = tills(seed)
    commands: list[Order] = [(name, "account.open", {"name": name.upper()}) for name in names]
    commands += [(name, "customer.bind", {"customer": name}) for name in bound(seed)]
    return commands + [(name, "policy.set", POLICY) for name in names]


def bound(seed: int) -> list[str]:
    """Those with a customer."""
    return tills(seed)[::2]


@dataclass(frozen=True)
class Wish:
    """One call: what the gate is asked, and who makes it."""

    ask: Ask
    principal: str
    who: dict[str, str]


def wish(random: Random, seed: int, call: str, ttl_s: int) -> Wish:
    """A call of a random till, principal, agent, session and run, of those that are open now."""
    now_s = int(time.time())
    principal = f"u{random.randrange(3)}"
    who = {
        "agent": f"a{random.randrange(2)}",
        "session": f"s{now_s // SESSION_S}-{random.randrange(2)}",
        "run": f"r{now_s // RUN_S}-{random.randrange(4)}",
    }
    most = random.randint(1, MOST)
    amounts: dict[str, int | tuple[int, int]] = {"calls": 1, METER: (most, random.randint(1, most))}
    ask = Ask(random.choice(tills(seed)), scopes_of("user", principal, **who), amounts, call, ttl_s)
    return Wish(ask, principal, who)


def limit_of(scope: str, meter: str, window: str) -> int | None:
    """What a till's scope may use of a meter in a window."""
    return LIMITS.get((scope.partition(":")[0], meter, window))


def overspent(book: Book, seed: int) -> dict[Total, int]:
    """Units beyond a limit, by what the log says was used: total → units too many."""
    names, found = set(tills(seed)), dict[Total, int]()
    for total, units in book.used.items():
        account, scope, meter, window, _ = total
        most = limit_of(scope, meter, window) if account in names else None
        if most is not None and units > most:
            found[total] = units - most
    return found
