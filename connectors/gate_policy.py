"""What a gate answers when Redis cannot: the policy's outage answer, as last told, and leases taken beforehand (design §6)."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tollway.connectors.gate_decision import UNAVAILABLE, Ask, Decision, Hold, Left
from tollway.schemas.command import OUTAGES

ACCOUNTS_MAX = 10_000
"""Accounts whose outage answer is remembered; the longest unused is forgotten, and then closed."""
LEASES_MAX = 1_000
"""Leases at once; further callers have none, and are refused in an outage."""
LEASE_S = 300
LEASE_SHARE = 100
"""A lease is at most the least limit / this."""

Key = tuple[str, tuple[str, ...], tuple[str, ...]]
"""account, scopes, meters."""


@dataclass
class Lease:
    """A real hold that calls draw on while Redis is away. Usage drawn from it names no hold: the lease covers it until
    it expires by log time, when that usage has been folded."""

    hold: Hold
    ends_at: float
    left: dict[str, int]
    drawn: bool = False


@dataclass
class Outages:
    """Accounts' outage answers, newest last, and leases by who draws on them."""

    default: str
    answers: OrderedDict[str, str] = field(default_factory=OrderedDict)
    leases: dict[Key, Lease] = field(default_factory=dict)
    wanted: dict[Key, tuple[Ask, dict[str, int]]] = field(default_factory=dict)
    """Leases to be taken: the ask they are for, and how much each may hold."""

    def learn(self, account: str, answer: str) -> None:
        """What Redis said last."""
        if answer not in OUTAGES:
            return
        self.answers[account] = answer
        self.answers.move_to_end(account)
        if len(self.answers) > ACCOUNTS_MAX:
            self.answers.popitem(last=False)

    def of(self, account: str) -> str:
        return self.answers.get(account, self.default)

    def wants(self, ask: Ask, left: tuple[Left, ...], now: float) -> None:
        """An allowed call of an account with leases: take one for the next outage, where there is none that lasts."""
        key = key_of(ask)
        known = self.leases.get(key)
        if (known is not None and known.ends_at - now > LEASE_S // 2) or key in self.wanted:
            return
        if len(self.leases) + len(self.wanted) >= LEASES_MAX and known is None:
            return
        shares = shares_of(ask, left)
        if shares and all(shares.values()):
            self.wanted[key] = (ask, shares)

    def answer(self, ask: Ask, reason: str, now: float) -> Decision:
        """The outage answer to one ask."""
        kind = self.of(ask.account)
        if kind == "open":
            return Decision(
                "allowed", ask, reason, source="open", up_to={meter: most for meter, most, _ in ask.triples}
            )
        if kind == "lease":
            drawn = self._drawn(ask, now)
            if drawn is not None:
                return Decision("allowed", ask, reason, source="lease", up_to=drawn)
            reason = "no_lease"
        return Decision(UNAVAILABLE, ask, reason)

    def _drawn(self, ask: Ask, now: float) -> Mapping[str, int] | None:
        lease = self.leases.get(key_of(ask))
        if lease is None or lease.ends_at <= now:
            return None
        grants = {meter: min(most, lease.left.get(meter, 0)) for meter, most, _ in ask.triples}
        if any(grants[meter] < max(1, least) for meter, _, least in ask.triples):
            return None
        for meter, units in grants.items():
            lease.left[meter] -= units
        lease.drawn = True
        return grants


def key_of(ask: Ask) -> Key:
    return ask.account, ask.scopes, tuple(sorted(ask.amounts))


def shares_of(ask: Ask, left: tuple[Left, ...]) -> dict[str, int]:
    """meter → units that a lease may hold: a hundredth of its least limit. Meters without a limit need no lease, nor does such an ask."""
    limits: dict[str, int] = {}
    for row in left:
        if row.meter in ask.amounts:
            limits[row.meter] = min(row.limit, limits.get(row.meter, row.limit))
    return {meter: limits[meter] // LEASE_SHARE for meter in ask.amounts if meter in limits}
