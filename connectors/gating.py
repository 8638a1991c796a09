"""What a gate is asked for a call, and what its refusal tells the caller. Pure."""

from typing import TYPE_CHECKING, Any

from tollway.connectors.context import Origin
from tollway.connectors.denied import Denied
from tollway.connectors.gate_decision import Ask, Decision, scopes_of
from tollway.connectors.principal import Principal

if TYPE_CHECKING:
    from tollway.connectors.call import Call


def bind(fields: dict[str, Any], principal: Principal, origin: Origin) -> None:
    """A principal that is bound to agents is one of them, whatever the caller's baggage says: the first, if none is named."""
    agents = [scope.partition(":")[2] for scope in principal.scopes if scope.startswith("agent:")]
    if agents and (fields.get("agent") or origin.agent) not in agents:
        fields["agent"] = agents[0]


def ask_for(call: "Call", principal: Principal, origin: Origin, ttl_s: int) -> Ask:
    """One call and what else it asks for, in all scopes in which the fold will count it. Raises Refused for a bad `ask`."""
    known = {"agent": origin.agent, "session": origin.session, "run": origin.run}
    named = {name: call.fields.get(name) or value for name, value in known.items()}
    scopes = scopes_of(principal.kind, principal.id, **named)
    amounts = {"calls": 1, **(call.ask or {})}
    return Ask(
        principal.account,
        scopes,
        amounts,
        call=call.call_id,
        ttl_s=ttl_s,
        fingerprint=call.fingerprint or call.operation,
    )


def denied_by(decision: Decision) -> Denied:
    """What is raised instead of the call."""
    return Denied(decision.status, decision.problem(), decision.headers())


def not_allowed(principal: Principal, operation: str) -> Denied:
    """A principal that is bound to other operations."""
    return Denied(
        403,
        {
            "type": "about:blank",
            "title": "This operation is not allowed",
            "status": 403,
            "detail": f"{principal.kind} {principal.id} of {principal.account} may not call {operation}",
            "reason": "operation",
        },
    )
