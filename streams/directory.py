"""The directory: keys, meters, prices and accounts, folded from commands at their offsets. One a partition."""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tollway.schemas.command import BINDINGS_MAX, DEFAULT_POLICY, REMEMBERED_S, LogConfig
from tollway.schemas.topics import BROADCAST

CHANGED_MAX = 10_000
"""Changes of bindings that a view may lag behind before it writes all of them again."""

Token = tuple[str, str, str]
"""Issuer, kind (user or client), subject: whose bearer token it is."""


@dataclass
class Binding:
    """Who a token's bearer is. `principal` is None once it is unbound: remembered 35 days, so that every reader hears it."""

    principal: str | None
    scopes: list[str]
    operations: list[str]
    at_ms: int
    offset: int
    """Where the command stands: the later of two wins."""


@dataclass
class Account:
    """A billable organisation. `policy` is None until a `policy.set`: the default counts then."""

    name: str = ""
    customer: str | None = None
    policy_own: dict[str, Any] | None = None
    policy_version: int = 0
    frozen: bool = False
    bindings: dict[Token, Binding] = field(default_factory=dict)
    signed: dict[str, list[Any]] = field(default_factory=dict)
    """kind → [key id, command id, append time (ms), offset] of the last command of each kind: who changed what."""

    @property
    def policy(self) -> dict[str, Any]:
        """Which meters x windows x scopes are counted, and their limits: a body of `policy.set`."""
        return self.policy_own or DEFAULT_POLICY


class Directory:
    """What the commands of one partition have established so far."""

    def __init__(self) -> None:
        self.config: LogConfig | None = None
        self.keys: dict[str, str] = {}
        self.meters: dict[str, str | None] = {}
        self.prices: dict[str, dict[str, Any]] = {}
        self.accounts: dict[str, Account] = {}
        self.seen: dict[str, int] = {}
        """command_id → append time (ms) of every accepted command of the last 35 days."""
        self.bound = 0
        """Changes of bindings since this process loaded the state."""
        self.bound_offset = -1
        """Offset of the last of them in the log."""
        self.fold_version = 1
        """How the partition is folded since the step that was entered last."""
        self.fold_changes: dict[int, int] = {}
        """version → time (s) from whose step on it counts; ascending both."""
        self._changed: deque[tuple[str, Token]] = deque(maxlen=CHANGED_MAX)

    def account(self, name: str) -> Account | None:
        """The account; opened on sight where the log says `auto_open`; None where it is unknown."""
        found = self.accounts.get(name)
        if found is None and self.config is not None and self.config.auto_open:
            found = self.accounts[name] = Account()
        return found

    def change_fold(self, step_time_s: int) -> None:
        """A step begins: versions that are due take effect."""
        due = [version for version, at_s in self.fold_changes.items() if at_s <= step_time_s]
        self.fold_version = max([self.fold_version, *due])

    def fold_refusal(self, body: dict[str, Any]) -> tuple[str, str] | None:
        """(reason, detail) where a `fold.change` does not follow the newest one."""
        newest, at_s = max(self.fold_changes.items(), default=(1, 0))
        if body["version"] == newest + 1 and body["at_s"] >= at_s:
            return None
        return "bad_command", f"fold version {newest} counts from {at_s} s on: the next is {newest + 1}, no earlier"

    def refusal(self, kind: str, account: str, body: dict[str, Any]) -> tuple[str, str] | None:
        """(reason, detail) where an account's command has a sound body, but nothing here to change."""
        found = self.account(account)
        if found is None:
            return (
                None
                if kind == "account.open"
                else ("unknown_account", f"{account!r} is not open: tollway account open")
            )
        if kind == "principal.bind" and len(found.bindings) >= BINDINGS_MAX and token(body) not in found.bindings:
            return (
                "too_many_bindings",
                f"{account!r} has {BINDINGS_MAX} principals: unbind some, or use another account",
            )
        if kind == "principal.unbind" and token(body) not in found.bindings:
            return (
                "bad_command",
                f"{body['kind']} {body['subject']!r} of {body['issuer']!r} is not bound to {account!r}",
            )
        return None

    def bindings(self) -> list[tuple[str, Token]]:
        """(account, token) of all bindings."""
        return [(name, token) for name, account in self.accounts.items() for token in account.bindings]

    def bindings_since(self, bound: int) -> Iterable[tuple[str, Token]]:
        """Those that changed since the count was `bound`; all where that is long ago."""
        count = self.bound - bound
        return dict.fromkeys(list(self._changed)[-count:]) if count <= len(self._changed) else self.bindings()

    def signed_by(self, kid: str, signature: bytes, value: bytes) -> bool:
        """Whether `signature` is Ed25519 over `value` by the key that the log calls `kid`."""
        public = self.keys.get(kid)
        return public is not None and verified(public, signature, value)

    def apply(self, command: dict[str, Any], append_ms: int, offset: int) -> None:
        """Take an accepted command in. Its body was checked by `schemas.command.check_body`."""
        self.seen[command["command_id"]] = append_ms
        kind, body, account = command["kind"], command["body"], command["account"]
        if kind == "log.open":
            self.config = LogConfig(**body)
            self.keys[self.config.kid] = self.config.public_key
        elif kind == "key.add":
            self.keys[body["kid"]] = body["public_key"]
        elif kind == "meter.add":
            self.meters[body["meter"]] = body.get("event_name")
        elif kind == "price.add":
            self.prices.setdefault(body["price_ref"], {"asset": body["asset"], "unit_nano": body["unit_nano"]})
        elif kind == "fold.change":
            self.fold_changes[body["version"]] = body["at_s"]
        elif account != BROADCAST:
            opened = self.accounts.setdefault(account, Account())
            opened.signed[kind] = [command.get("kid", ""), command["command_id"], append_ms, offset]
            _change(opened, kind, body, append_ms, offset)
            if kind in ("principal.bind", "principal.unbind"):
                self._changed.append((account, token(body)))
                self.bound, self.bound_offset = self.bound + 1, offset

    def forget(self, now_ms: int) -> None:
        """Drop command ids that are past their 35 days: `stale_command` refuses them by then."""
        old = now_ms - REMEMBERED_S * 1000
        for command_id in [known for known, at in self.seen.items() if at < old]:
            del self.seen[command_id]
        for account in self.accounts.values():
            gone = [token for token, bound in account.bindings.items() if bound.principal is None and bound.at_ms < old]
            for unbound in gone:
                del account.bindings[unbound]

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it."""
        return {
            "config": self.config.body() if self.config else None,
            "keys": self.keys,
            "meters": self.meters,
            "prices": self.prices,
            "accounts": {
                name: [
                    account.name,
                    account.customer,
                    account.policy_own,
                    account.policy_version,
                    account.frozen,
                    [[*token, *vars(bound).values()] for token, bound in account.bindings.items()],
                    account.signed,
                ]
                for name, account in self.accounts.items()
            },
            "seen": self.seen,
            # left out where it says nothing: states of builds that did not know it keep their hash
            **({"fold": [self.fold_version, self.fold_changes]} if self.fold_changes else {}),
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Directory":
        """The inverse of `dump`."""
        directory = cls()
        directory.config = LogConfig(**state["config"]) if state["config"] else None
        directory.keys, directory.meters = state["keys"], state["meters"]
        directory.prices, directory.seen = state["prices"], state["seen"]
        directory.fold_version, directory.fold_changes = state.get("fold", (1, {}))
        for name, (title, customer, policy, version, frozen, bindings, signed) in state["accounts"].items():
            bound = {(issuer, who, subject): Binding(*rest) for issuer, who, subject, *rest in bindings}
            directory.accounts[name] = Account(title, customer, policy, version, frozen, bound, signed)
            newest = max((entry.offset for entry in bound.values()), default=-1)
            directory.bound_offset = max(directory.bound_offset, newest)
        return directory


def token(body: dict[str, Any]) -> Token:
    """Whose token a `principal.bind` or `principal.unbind` names."""
    return body["issuer"], body["kind"], body["subject"]


def _change(account: Account, kind: str, body: dict[str, Any], append_ms: int, offset: int) -> None:
    if kind == "account.open":
        account.name = body.get("name", "")
    elif kind == "customer.bind":
        account.customer = body["customer"]
    elif kind == "policy.set":
        account.policy_own = {**DEFAULT_POLICY, **body}
        account.policy_version += 1
    elif kind in ("account.freeze", "account.unfreeze"):
        account.frozen = kind == "account.freeze"
    elif kind in ("principal.bind", "principal.unbind"):
        account.bindings[token(body)] = Binding(
            body.get("principal"), body.get("scopes", []), body.get("operations", []), append_ms, offset
        )


def verified(public_key: str, signature: bytes, value: bytes) -> bool:
    """Ed25519 over the record's value; a malformed key or signature is a false one."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, value)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(public_key: str) -> str:
    """Default key id: the first 16 hex digits of the key's SHA-256."""
    return hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:16]
