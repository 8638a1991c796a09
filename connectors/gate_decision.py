"""What a gate is asked and what it answers: plain values (design §6). The HTTP form of an answer is `connectors.problem`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from tollway.connectors import problem
from tollway.connectors.errors import Refused
from tollway.schemas.command import SCOPE_KINDS
from tollway.schemas.usage import ID, METER, PRINCIPAL_KINDS

SCOPES_MAX = 8
AMOUNT_MAX = 9 * 10**18
TTL_MAX_S = 3_600

ALLOWED, DUPLICATE, CONFLICT = "allowed", "duplicate", "conflict"
UNAVAILABLE, FROZEN, UNKNOWN, DENIED = "unavailable", "frozen", "unknown", "denied"
STATUSES = {ALLOWED: 200, DUPLICATE: 409, CONFLICT: 409, UNAVAILABLE: 503, FROZEN: 403, UNKNOWN: 403}
BUDGET_KINDS = ("run", "sess", "agent")
"""A life limit of these is a budget (403); one of an account or principal is a balance (402)."""
CLOSED = "closed"
"""Reason of a denial: the run or session has ended, and its id does not start again at zero."""


@dataclass(frozen=True)
class Ask:
    """May this call pass, and up to what amount?

    scopes: 1 to 8 of `acct`, `user:<id>`, `client:<id>`, `anon:<id>`, `agent:<id>`, `sess:<id>`, `run:<id>`.
    amounts: meter → units, or (ask, least): up to `ask`, not below `least`; 0 ≤ least ≤ ask ≤ 9·10¹⁸.
    call: the call's id, the same at every retry; "" = no retry is recognised. ttl_s: how long the call may take, 1 to 3,600.
    fingerprint: of what is called; another one under the same call id is a conflict.
    Raises Refused naming field, value and cure.
    """

    account: str
    scopes: tuple[str, ...]
    amounts: Mapping[str, int | tuple[int, int]]
    call: str = ""
    ttl_s: int = 60
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name, text in (("account", self.account), ("call", self.call or "-")):
            if not (isinstance(text, str) and ID.fullmatch(text)):
                raise Refused(f"{name} is {text!r}: ids match {ID.pattern}")
        if not 1 <= len(self.scopes) <= SCOPES_MAX or len(set(self.scopes)) < len(self.scopes):
            raise Refused(f"scopes are {self.scopes!r}: give 1 to {SCOPES_MAX} different ones")
        for scope in self.scopes:
            kind, colon, rest = scope.partition(":")
            if kind not in SCOPE_KINDS or (kind == "acct") == bool(colon) or (colon and not ID.fullmatch(rest)):
                raise Refused(
                    f"scopes has {scope!r}: give acct or kind:id, the kind one of {', '.join(SCOPE_KINDS[1:])}"
                )
        for meter, units in self.amounts.items():
            ask, least = units if isinstance(units, tuple) else (units, units)
            if not METER.fullmatch(meter):
                raise Refused(f"amounts has {meter!r}: meters match {METER.pattern}")
            if (
                any(not isinstance(n, int) or isinstance(n, bool) for n in (ask, least))
                or not 0 <= least <= ask <= AMOUNT_MAX
            ):
                raise Refused(
                    f"amounts.{meter} is {units!r}: give units or (ask, least), 0 ≤ least ≤ ask ≤ {AMOUNT_MAX}"
                )
        if not 1 <= self.ttl_s <= TTL_MAX_S:
            raise Refused(f"ttl_s is {self.ttl_s!r}: give 1 to {TTL_MAX_S} seconds")

    @cached_property
    def triples(self) -> tuple[tuple[str, int, int], ...]:
        """(meter, ask, least) each."""
        pairs = (
            (meter, units if isinstance(units, tuple) else (units, units)) for meter, units in self.amounts.items()
        )
        return tuple((meter, ask, least) for meter, (ask, least) in pairs)

    @cached_property
    def digest(self) -> str:
        """Equal for equal asks: what a retry is compared by."""
        text = json.dumps([self.account, self.scopes, sorted(self.triples), self.fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def scopes_of(
    principal_kind: str, principal: str, *, agent: str | None = None, session: str | None = None, run: str | None = None
) -> tuple[str, ...]:
    """The scopes in which the fold counts a call: its account's, its principal's, and those of agent, session and run."""
    if principal_kind not in PRINCIPAL_KINDS:
        raise Refused(f"principal_kind is {principal_kind!r}: give one of {', '.join(PRINCIPAL_KINDS)}")
    kind = "anon" if principal_kind == "anonymous" else principal_kind
    named = (("agent", agent), ("sess", session), ("run", run))
    return ("acct", f"{kind}:{principal}", *(f"{name}:{value}" for name, value in named if value is not None))


class Left(NamedTuple):
    """One limit that the ask met: `left` units after the grant; times are seconds since 1970, `end_s` None = it never resets."""

    scope: str
    meter: str
    window: str
    start_s: int
    end_s: int | None
    limit: int
    left: int

    @property
    def name(self) -> str:
        """Of the quota policy in headers and problems."""
        return f"{self.scope.partition(':')[0]}-{self.meter}-{self.window}"


@dataclass(frozen=True)
class Hold:
    """A granted hold: what capture, void and extend need. A plain value: another process of the same service may end it."""

    id: str
    account: str
    call: str
    at_us: int
    """Redis' time of the grant: the usage's `occurred_at`, so that hold and usage count in the same windows."""
    expires_at_ms: int
    fields: tuple[tuple[str, str, int], ...]
    """(<account>~<scope>, `<meter> <window>:<start>`, units) each."""


@dataclass(frozen=True)
class Extension:
    """The answer to extend: the hold as it now is, whether it was granted, else why not (deny, done, gone, frozen, an outage)."""

    hold: Hold
    granted: bool
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """The gate's answer. `allowed` alone is a licence to execute; `status` is its HTTP status."""

    verdict: str
    ask: Ask
    reason: str = ""
    """Why it is unavailable (away, slow, busy, cold, generation, clock, stale, no_lease), or denied (limit, closed)."""
    source: str = "gate"
    """Who answered: gate, or the policy's outage answer: open, lease."""
    hold: Hold | None = None
    up_to: Mapping[str, int] = field(default_factory=dict)
    """meter → units granted, where it is allowed (or was, for a duplicate)."""
    at_us: int | None = None
    refused_by: Left | None = None
    """The limit with least left, of those that refused."""
    left: tuple[Left, ...] = ()
    staleness_ms: int | None = None
    """Redis' clock − the log time that the totals are of."""

    @property
    def allowed(self) -> bool:
        return self.verdict == ALLOWED

    @property
    def status(self) -> int:
        """200, 402 balance, 403 budget, frozen or unknown, 409 duplicate or conflict, 429 window, 503 outage."""
        if self.verdict != DENIED:
            return STATUSES[self.verdict]
        if self.refused_by is None or self.reason == CLOSED:
            return 403
        if self.refused_by.window != "L":
            return 429
        return 403 if self.refused_by.scope.partition(":")[0] in BUDGET_KINDS else 402

    @property
    def stamp(self) -> dict[str, str]:
        """Attributes of the usage: says where the gate did not decide itself."""
        return {} if self.source == "gate" else {"gate": self.source}

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds until asking again may help; None = it will not by itself."""
        if self.verdict == UNAVAILABLE:
            return 1
        found = self.refused_by
        if self.status != 429 or found is None or found.end_s is None or self.at_us is None:
            return None
        return max(1, found.end_s - self.at_us // 1_000_000)

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem; {} where it is allowed."""
        return problem.problem(self)

    def headers(self) -> list[tuple[str, str]]:
        """RateLimit-Policy, RateLimit and Retry-After, as far as they apply."""
        return problem.headers(self)
