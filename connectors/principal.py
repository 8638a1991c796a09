"""Who is billed: a principal and its account. A directory tells them from a token's verified claims."""

import hashlib
from base64 import b32encode
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tollway.connectors.errors import Refused
from tollway.schemas.usage import ID, PRINCIPAL_KINDS

if TYPE_CHECKING:
    from tollway.connectors.bindings import Bindings

PSEUDONYM_LETTERS = 26
"""130 bits."""


class Principal(NamedTuple):
    """`kind` is user, client or anonymous; `id` a pseudonym; `account` the organisation that pays.

    scopes: more scopes that a gate asks for it, such as `agent:helpdesk`. operations: names, or beginnings with a `*`
    behind, that it may call; empty = all.
    """

    kind: str
    id: str
    account: str
    scopes: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()

    def may(self, operation: str) -> bool:
        """Whether it may call this operation."""
        return not self.operations or any(
            operation.startswith(name[:-1]) if name.endswith("*") else operation == name for name in self.operations
        )


ANONYMOUS = Principal("anonymous", "anonymous", "public")

SCOPE_KEY = "tollway.principal"
"""In an ASGI scope: whom `MeterMiddleware` identified."""

Claims = Mapping[str, Any]
Directory = Callable[[Claims], Principal | Awaitable[Principal | None] | None]
"""Verified claims → the principal, or None where nobody knows it. Raises Unavailable where that cannot be told just now."""


def principal(kind: str, id: str, account: str) -> Principal:
    """A principal that can be recorded. Raises Refused naming what cannot."""
    if kind not in PRINCIPAL_KINDS:
        raise Refused(f"kind is {kind!r}: give one of {', '.join(PRINCIPAL_KINDS)}")
    for name, value in (("id", id), ("account", account)):
        if not (isinstance(value, str) and ID.fullmatch(value)):
            raise Refused(f"{name} is {value!r}: ids match {ID.pattern}")
    return Principal(kind, id, account)


def bearer_of(claims: Claims) -> tuple[str, str, str]:
    """(issuer, kind, subject) of verified claims: who `principal.bind` names.

    A client acts for itself where the issuer says so (`gty`, `idtyp`), where there is no subject, and where the subject is
    the client (RFC 9068 §2.2); else a user does. A client's subject is its `client_id` (or `azp`).
    """
    client, subject = _text(claims, "client_id") or _text(claims, "azp"), _text(claims, "sub")
    for_itself = claims.get("gty") == "client-credentials" or claims.get("idtyp") == "app"
    if for_itself or not subject or (client and subject in (client, f"{client}@clients")):
        return _text(claims, "iss"), "client", client or subject
    return _text(claims, "iss"), "user", subject


def pseudonym(issuer: str, subject: str) -> str:
    """An id that is always the same for a subject of an issuer and does not show it."""
    digest = hashlib.sha256(f"{len(issuer)}:{issuer}{subject}".encode()).digest()
    return b32encode(digest).decode().lower()[:PSEUDONYM_LETTERS]


def bound_by(bindings: "Bindings") -> Directory:
    """A directory of what the signed commands `principal.bind` say. Nobody else is known."""

    async def resolve(claims: Claims) -> Principal | None:
        found = await bindings.bound(*bearer_of(claims))
        if found is None:
            return None
        return Principal(found.principal_kind, found.principal, found.account, found.scopes, found.operations)

    return resolve


class ClaimedAccount:
    """A directory for issuers that say the organisation in a claim: principals are pseudonyms of the token's subject."""

    def __init__(self, account_claim: str) -> None:
        self.account_claim = account_claim

    def __call__(self, claims: Claims) -> Principal | None:
        """None where the claim is missing or no id, and where the token names nobody."""
        issuer, kind, subject = bearer_of(claims)
        account = _text(claims, self.account_claim)
        if not subject or not ID.fullmatch(account):
            return None
        return Principal(kind, pseudonym(issuer, subject), account)


def _text(claims: Claims, name: str) -> str:
    value = claims.get(name)
    return value if isinstance(value, str) else ""
