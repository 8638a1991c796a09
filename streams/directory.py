"""The directory: keys, meters, prices and accounts, folded from commands at their offsets. One a partition."""

import hashlib
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tollway.schemas.command import DEFAULT_POLICY, REMEMBERED_S, LogConfig


@dataclass
class Account:
    """A billable organisation. `policy` is None until a `policy.set`: the default counts then."""

    name: str = ""
    customer: str | None = None
    policy_own: dict[str, Any] | None = None
    policy_version: int = 0

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

    def account(self, name: str) -> Account | None:
        """The account; opened on sight where the log says `auto_open`; None where it is unknown."""
        found = self.accounts.get(name)
        if found is None and self.config is not None and self.config.auto_open:
            found = self.accounts[name] = Account()
        return found

    def signed_by(self, kid: str, signature: bytes, value: bytes) -> bool:
        """Whether `signature` is Ed25519 over `value` by the key that the log calls `kid`."""
        public = self.keys.get(kid)
        return public is not None and verified(public, signature, value)

    def apply(self, command: dict[str, Any], append_ms: int) -> None:
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
        elif kind == "account.open":
            self.accounts.setdefault(account, Account()).name = body.get("name", "")
        elif kind == "customer.bind":
            self.accounts[account].customer = body["customer"]
        elif kind == "policy.set":
            opened = self.accounts[account]
            opened.policy_own = {**DEFAULT_POLICY, **body}
            opened.policy_version += 1

    def forget(self, now_ms: int) -> None:
        """Drop command ids that are past their 35 days: `stale_command` refuses them by then."""
        old = now_ms - REMEMBERED_S * 1000
        for command_id in [known for known, at in self.seen.items() if at < old]:
            del self.seen[command_id]

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it."""
        return {
            "config": self.config.body() if self.config else None,
            "keys": self.keys,
            "meters": self.meters,
            "prices": self.prices,
            "accounts": {
                name: [account.name, account.customer, account.policy_own, account.policy_version]
                for name, account in self.accounts.items()
            },
            "seen": self.seen,
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Directory":
        """The inverse of `dump`."""
        directory = cls()
        directory.config = LogConfig(**state["config"]) if state["config"] else None
        directory.keys, directory.meters = state["keys"], state["meters"]
        directory.prices, directory.seen = state["prices"], state["seen"]
        directory.accounts = {name: Account(*fields) for name, fields in state["accounts"].items()}
        return directory


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
