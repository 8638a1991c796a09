"""A gate's decision as HTTP says it: RFC 9457 problems and the fields of draft-ietf-httpapi-ratelimit-headers-11. Pure."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tollway.connectors.gate_decision import Decision, Left

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
BLANK = "about:blank"
WINDOW_S = {"m": 60, "h": 3_600, "d": 86_400}
SF_INTEGER_MAX = 999_999_999_999_999
"""RFC 9651: larger whole numbers are no structured field; they are cut to this."""

TITLES = {
    "duplicate": "This call id has been decided before",
    "conflict": "This call id was used for another call",
    "unavailable": "The quota cannot be looked up",
    "frozen": "The account is frozen",
    "unknown": "The account is not known",
    402: "The balance is used up",
    403: "The budget is used up",
    429: "The quota is used up",
}


def problem(decision: "Decision") -> dict[str, Any]:
    """The problem of a refusal, with what a caller needs to react; {} where it is allowed."""
    if decision.allowed:
        return {}
    kind, refused = BLANK, decision.refused_by
    if decision.verdict == "denied" and decision.reason != "closed":
        kind = QUOTA_EXCEEDED
    elif decision.verdict == "unavailable":
        kind = REDUCED_CAPACITY
    title = TITLES.get(decision.verdict) or TITLES[decision.status]
    found: dict[str, Any] = {"type": kind, "title": title, "status": decision.status, "detail": _detail(decision)}
    if decision.reason:
        found["reason"] = decision.reason
    if refused is not None and decision.reason != "closed":
        found |= {"violated-policies": [refused.name], "scope": refused.scope, "meter": refused.meter}
        found |= {"window": refused.window, "limit": refused.limit, "left": max(0, refused.left)}
        found |= {"resets_at": refused.end_s} if refused.end_s is not None else {}
    if decision.retry_after_s is not None:
        found["retry_after_s"] = decision.retry_after_s
    if decision.verdict == "duplicate" and decision.hold is not None:
        found |= {"hold": decision.hold.id, "up_to": dict(decision.up_to)}
    if decision.staleness_ms is not None:
        found["staleness_ms"] = decision.staleness_ms
    return found


def _detail(decision: "Decision") -> str:
    refused = decision.refused_by
    if decision.verdict == "denied" and refused is not None:
        if decision.reason == "closed":
            return f"{refused.scope} has ended: start another one"
        least = next((least for meter, _, least in decision.ask.triples if meter == refused.meter), 1)
        return f"{refused.scope} has {max(0, refused.left)} of {refused.limit} {refused.meter} left, the call needs {least}"
    if decision.verdict == "unavailable":
        return f"No decision can be made just now ({decision.reason}): try again"
    if decision.verdict == "duplicate":
        return "Its earlier answer stands; it is no licence to execute the call twice"
    if decision.verdict == "conflict":
        return f"Call id {decision.ask.call} was given with another content: use one id for one call"
    return f"Account {decision.ask.account} may not call"


def headers(decision: "Decision") -> list[tuple[str, str]]:
    """RateLimit-Policy and RateLimit of the limits met, scarcest first and each name once; Retry-After where it helps."""
    rows: dict[str, Left] = {}
    for row in sorted(decision.left, key=lambda row: (row is not decision.refused_by, row.left)):
        rows.setdefault(row.name, row)
    found: list[tuple[str, str]] = []
    if rows:
        found.append(("RateLimit-Policy", ", ".join(map(_policy, rows.values()))))
        found.append(("RateLimit", ", ".join(_state(row, decision.at_us) for row in rows.values())))
    if decision.retry_after_s is not None:
        found.append(("Retry-After", str(decision.retry_after_s)))
    return found


def _policy(row: "Left") -> str:
    """`"user-calls-h";q=100;w=3600`; a month's length differs, a life has none: both are told without `w`."""
    length = WINDOW_S.get(row.window)
    unit = "" if row.meter == "calls" else f';qu="{row.meter}"'  # without one, requests are counted
    return f'"{row.name}";q={min(row.limit, SF_INTEGER_MAX)}{unit}' + (f";w={length}" if length else "")


def _state(row: "Left", at_us: int | None) -> str:
    left = min(max(0, row.left), SF_INTEGER_MAX)
    reset = "" if row.end_s is None or at_us is None else f";t={max(0, row.end_s - at_us // 1_000_000)}"
    return f'"{row.name}";r={left}{reset}'
