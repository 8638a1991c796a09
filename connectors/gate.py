"""The gate: may this call pass, and up to what amount? (design §6; docs/gate.md)."""

from tollway.connectors.gate_decision import Ask, Decision, Hold, Left, scopes_of

__all__ = ["Ask", "Decision", "Hold", "Left", "scopes_of"]
