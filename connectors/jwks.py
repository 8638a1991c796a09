"""An issuer's public keys: fetched once for all who wait, kept for a while, and looked at again when an unknown one signs."""

import asyncio
import ipaddress
import json
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tollway.connectors.errors import Refused, Unavailable

if TYPE_CHECKING:
    from jwt import PyJWK

TTL_S = 300.0
STALE_S = 86_400.0
"""So long known keys serve while the issuer does not answer."""
RETRY_S = 10.0
TIMEOUT_S = 5.0
BYTES_MAX = 256 << 10
KEYS_MAX = 100
"""Further keys of a set are not read."""


class Jwks:
    """Keys by id. For one event loop.

    A key that is taken off the issuer's list is refused at most `ttl_s` and one fetch later; a new one is known at its first
    token, unless the list was asked for less than `retry_s` ago: unknown ids can never make more fetches than that.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float = TTL_S,
        stale_s: float = STALE_S,
        retry_s: float = RETRY_S,
        timeout_s: float = TIMEOUT_S,
        allow_http: bool = False,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """url: https, or http on loopback (elsewhere with allow_http: whoever stands between can then be anyone).

        Raises Refused for another url.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and (allow_http or _is_loopback(parts.hostname))):
            raise Refused(f"url is {url!r}: give the issuer's jwks_uri, with https")
        self.url, self._ttl_s, self._stale_s, self._retry_s = url, ttl_s, stale_s, retry_s
        self._timeout_s, self._clock_s = timeout_s, clock_s
        self._keys: dict[str, dict[str, Any]] = {}
        self._made: dict[tuple[str, str], PyJWK | None] = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the last fetch failed; None where it did not."""
        self.fetches = 0

    async def key(self, kid: str, algorithm: str) -> "PyJWK | None":
        """The key of this id, for this algorithm; None where the issuer has none. kid "": the only one, where it is.

        Raises Unavailable where the issuer cannot be asked.
        """
        age = self._clock_s() - self._fetched_at
        if (kid not in self._keys and kid) or age >= self._stale_s:
            await self._refresh()
        elif age >= self._ttl_s:
            self._start()
        if self.problem is not None and (kid not in self._keys or self._clock_s() - self._fetched_at >= self._stale_s):
            raise Unavailable(f"the keys of {self.url} cannot be had: {self.problem}")
        return self._make(kid or (next(iter(self._keys)) if len(self._keys) == 1 else ""), algorithm)

    def _make(self, kid: str, algorithm: str) -> "PyJWK | None":
        raw = self._keys.get(kid)
        if raw is None or raw.get("alg", algorithm) != algorithm:
            return None
        if (kid, algorithm) not in self._made:  # bounded: KEYS_MAX ids, and the algorithms that are allowed
            from jwt import PyJWK, PyJWTError

            try:
                self._made[kid, algorithm] = PyJWK(raw, algorithm)
            except PyJWTError:
                self._made[kid, algorithm] = None
        return self._made[kid, algorithm]

    async def _refresh(self) -> None:
        self._start()
        if self._fetching is not None:
            await asyncio.shield(self._fetching)  # whoever gives up waiting leaves it to the others

    def _start(self) -> None:
        """Fetch, unless somebody is at it or has been lately."""
        if self._fetching is None and self._clock_s() - self._tried_at >= self._retry_s:
            self._tried_at = self._clock_s()
            self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        self.fetches += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await asyncio.to_thread(_get, self.url, self._timeout_s)
            self._keys = keys_of(body)
        except TimeoutError:
            self.problem = f"no answer within {self._timeout_s:g} s"
        except (OSError, HTTPException, ValueError) as error:
            self.problem = str(error)
        else:
            self._made.clear()
            self._fetched_at, self.problem = self._clock_s(), None
        finally:
            self._fetching = None


def keys_of(body: bytes) -> dict[str, dict[str, Any]]:
    """Signature keys of a set by their id; shared secrets and what is no key are passed over. Raises ValueError."""
    try:
        listed = json.loads(body)["keys"]
        rows = [key for key in listed[:KEYS_MAX] if isinstance(key, dict)]
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("the answer is no JSON Web Key Set") from error
    if not rows:
        raise ValueError("the set has no keys")
    usable = [key for key in rows if key.get("use", "sig") == "sig" and key.get("kty") in ("RSA", "EC", "OKP")]
    return {str(key.get("kid", number)): key for number, key in reversed(list(enumerate(usable)))}


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Keys come from where the service says, and from nowhere else."""


def _get(url: str, timeout_s: float) -> bytes:
    """Raises OSError, HTTPException or ValueError."""
    request = Request(url, headers={"Accept": "application/jwk-set+json, application/json"})
    try:
        with build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
            body: bytes = answer.read(BYTES_MAX + 1)
    except URLError as error:
        raise OSError(str(error.reason)) from error
    if len(body) > BYTES_MAX:
        raise ValueError(f"the answer has more than {BYTES_MAX} bytes")
    return body


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
