"""Who calls: a bearer token (JWT, RFC 9068) becomes a principal; what is wrong with it becomes a problem (RFC 9457, RFC 6750).

Nothing that a caller can simply write makes it somebody: without a token it is the anonymous principal, or refused.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from tollway.connectors.denied import Denied
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.jwks import Jwks
from tollway.connectors.principal import Claims, Directory, Principal

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""All that can be allowed: signatures by a key that the service does not have. Never `none`, never a shared secret."""
DEFAULT_ALGORITHMS = ("RS256", "ES256", "EdDSA")
LEEWAY_S = 30.0
TOKEN_BYTES_MAX = 16_384
RETRY_AFTER_S = 5

_DETAILS = {
    "no_token": "Give a bearer token in the Authorization header",
    "malformed_token": "The token is no JSON Web Token that can be read",
    "algorithm": "The token is signed in a way that is not accepted here",
    "unknown_key": "The token's issuer has no such key",
    "bad_signature": "The token's signature is wrong",
    "expired": "The token has expired: get a new one",
    "not_yet_valid": "The token is not valid yet",
    "wrong_audience": "The token is for another service",
    "wrong_issuer": "The token is of another issuer",
    "missing_claim": "The token lacks a claim that is needed: exp, iss, aud, and sub or client_id",
    "wrong_type": "The token is of another type: give an access token",
}


class Identity(Protocol):
    """Tells who calls by the value of the Authorization header. Raises Denied."""

    async def identify(self, authorization: str | None) -> Principal: ...


class Bearer:
    """Identity by JSON Web Tokens of one issuer. For one event loop."""

    def __init__(
        self,
        *,
        issuer: str,
        audience: str | Sequence[str],
        jwks: Jwks | str,
        directory: Directory,
        algorithms: Sequence[str] = DEFAULT_ALGORITHMS,
        leeway_s: float = LEEWAY_S,
        anonymous: Principal | None = None,
        token_type: str | None = None,
        realm: str = "tollway",
    ) -> None:
        """jwks: the keys or their url. directory: verified claims → principal (`bound_by`, `ClaimedAccount`, your own).

        leeway_s: how far clocks may differ. anonymous: who calls without a token; None = they are refused.
        token_type: the header's `typ`, such as `at+jwt`, where the issuer's identity tokens have the same audience.
        Raises Refused for an algorithm that is never accepted, or without issuer or audience.
        """
        for name in algorithms:
            if name not in ALGORITHMS:
                raise Refused(f"algorithms has {name!r}: give some of {', '.join(ALGORITHMS)}")
        if not (issuer and audience and algorithms):
            raise Refused("issuer, audience or algorithms is empty: a token of anybody, for anybody, would do")
        self.issuer, self.audience, self.directory = issuer, audience, directory
        self.jwks = jwks if isinstance(jwks, Jwks) else Jwks(jwks)
        self._algorithms, self._leeway_s = tuple(algorithms), leeway_s
        self._anonymous, self._token_type = anonymous, token_type
        self._realm = realm.replace("\\", "").replace('"', "")
        _import_jwt()

    async def identify(self, authorization: str | None) -> Principal:
        """The principal of an Authorization header's value. Raises Denied: 401, 403 for a stranger, 503."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            if self._anonymous is None:
                raise self._unauthorized("no_token")
            return self._anonymous
        return await resolve(self.directory, await self.claims(token.strip()))

    async def claims(self, token: str) -> dict[str, Any]:
        """A token's claims, all checked. Raises Denied: 401, 503."""
        import jwt

        if not token or len(token) > TOKEN_BYTES_MAX:
            raise self._unauthorized("malformed_token")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise self._unauthorized("malformed_token") from error
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in self._algorithms:
            raise self._unauthorized("algorithm")
        if self._token_type is not None and _media_type(header.get("typ")) != _media_type(self._token_type):
            raise self._unauthorized("wrong_type")
        try:
            key = await self.jwks.key(kid if isinstance(kid, str) else "", algorithm)
        except Unavailable as error:
            raise unavailable("keys", "The issuer's keys cannot be had just now") from error
        if key is None:
            raise self._unauthorized("unknown_key")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(self._algorithms),
                audience=self.audience,
                issuer=self.issuer,
                leeway=self._leeway_s,
                options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )
        except jwt.PyJWTError as error:
            raise self._unauthorized(reason_of(error)) from error
        if not any(isinstance(claims.get(name), str) and claims[name] for name in ("sub", "client_id", "azp")):
            raise self._unauthorized("missing_claim")
        return claims

    def _unauthorized(self, reason: str) -> Denied:
        detail = _DETAILS[reason]
        challenge = f'Bearer realm="{self._realm}"'
        if reason != "no_token":
            challenge += f', error="invalid_token", error_description="{detail}"'
        found = problem(401, "Who calls is not known", detail, reason)
        return Denied(401, found, [("WWW-Authenticate", challenge)])


async def resolve(directory: Directory, claims: Claims) -> Principal:
    """Who the directory says that verified claims are. Raises Denied: 403 for nobody, 503 where it cannot tell."""
    try:
        found = directory(claims)
        known = await found if inspect.isawaitable(found) else found
    except Unavailable as error:
        raise unavailable("directory", str(error)) from error
    if known is None:
        raise Denied(
            403, problem(403, "Nobody here", "The token is valid, but bound to no account", "unknown_principal")
        )
    return known


def reason_of(error: Exception) -> str:
    """PyJWT's exception in one word."""
    import jwt

    for kind, reason in (
        (jwt.ExpiredSignatureError, "expired"),
        (jwt.InvalidAudienceError, "wrong_audience"),
        (jwt.InvalidIssuerError, "wrong_issuer"),
        (jwt.ImmatureSignatureError, "not_yet_valid"),
        (jwt.MissingRequiredClaimError, "missing_claim"),
        (jwt.InvalidSignatureError, "bad_signature"),
        ((jwt.InvalidAlgorithmError, jwt.InvalidKeyError), "algorithm"),
    ):
        if isinstance(error, kind):
            return reason
    return "malformed_token"


def problem(status: int, title: str, detail: str, reason: str) -> dict[str, Any]:
    """RFC 9457. `reason` is one word for programs, and the usage's attribute `refused`."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "reason": reason}


def unavailable(reason: str, detail: str) -> Denied:
    """503: who it is cannot be told just now, which makes it nobody else."""
    return Denied(
        503, problem(503, "Who calls cannot be told just now", detail, reason), [("Retry-After", str(RETRY_AFTER_S))]
    )


def _media_type(name: object) -> str:
    return name.lower().removeprefix("application/") if isinstance(name, str) else ""


def _import_jwt() -> None:
    """Raises Refused where PyJWT is not installed."""
    try:
        import jwt
    except ImportError as error:
        raise Refused("PyJWT is not installed: pip install 'tollway[identity]'") from error
    if not jwt.algorithms.has_crypto:
        raise Refused("cryptography is not installed: pip install 'tollway[identity]'")
