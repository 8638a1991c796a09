"""An account's policy, read two ways: what the fold counts, and what the gate is told (design §5, §6)."""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack

from tollway.schemas.command import PRINCIPAL, SCOPE_KINDS
from tollway.streams.windows import FINEST_FIRST

PRINCIPAL_KINDS = ("user", "client", "anon")
KIND_CODES = {kind: code for code, kind in enumerate(SCOPE_KINDS)}
PLANS_MAX = 4_096  # distinct policies remembered; a forgotten one is compiled again


@dataclass(frozen=True, eq=False)
class Plan:
    """What one policy counts. Equal policies share one plan, so that their accounts are counted together."""

    shapes: tuple[tuple[tuple[str, ...], tuple[tuple[int, str], ...]], ...]
    """(windows, finest first; the (scope kind code, meter) pairs counted in just these windows)."""


def plan(policy: dict[str, Any]) -> Plan:
    """The plan of a policy. What two rows name is counted once; `principal` is user, client and anon.

    What a limit names is counted too: else a gate would forget it with every hold that ends.
    """
    limited = {(row["meter"], row["window"], row["scope"].partition(":")[0]) for row in policy["limits"]}
    rows = [[row["meter"], row["windows"], row["scopes"]] for row in policy["counts"]]
    return _plan(msgpack.packb(rows + [[meter, [window], [scope]] for meter, window, scope in sorted(limited)]))


@lru_cache(PLANS_MAX)
def _plan(counts: bytes) -> Plan:
    windows: dict[tuple[int, str], set[str]] = defaultdict(set)
    for meter, names, scopes in msgpack.unpackb(counts):
        for scope in scopes:
            for kind in PRINCIPAL_KINDS if scope == PRINCIPAL else (scope,):
                windows[KIND_CODES[kind], meter].update(names)
    shapes: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for pair, found in windows.items():
        shapes[tuple(sorted(found, key=FINEST_FIRST.__getitem__))].append(pair)
    return Plan(tuple(sorted((names, tuple(sorted(pairs))) for names, pairs in shapes.items())))


def gate_fields(policy: dict[str, Any], version: int, full: bool, frozen: bool = False) -> list[str]:
    """Fields and values of `p:<account>`, alternating: v, frozen, full, outage, max_staleness_s, limited and the limits.

    `limited` lists where limits are, such as `calls:hd tokens_out:M`: authorize looks at these alone.
    A limit's field is `<scope or kind>|<meter>|<window>`; `principal` is written as user, client and anon, which a limit
    for one of these kinds overrides.
    """
    fields = {
        "v": str(version),
        "frozen": str(int(frozen)),
        "full": str(int(full)),
        "outage": policy["outage"],
        "max_staleness_s": str(policy["max_staleness_s"]),
    }
    shapes: dict[str, set[str]] = defaultdict(set)
    for row in policy["limits"]:
        shapes[row["meter"]].add(row["window"])
    fields["limited"] = " ".join(f"{meter}:{''.join(sorted(windows))}" for meter, windows in sorted(shapes.items()))
    for row in sorted(policy["limits"], key=lambda row: bool(row["scope"] != PRINCIPAL)):
        for scope in PRINCIPAL_KINDS if row["scope"] == PRINCIPAL else (row["scope"],):
            fields[f"{scope}|{row['meter']}|{row['window']}"] = str(row["limit"])
    return [text for pair in fields.items() for text in pair]
