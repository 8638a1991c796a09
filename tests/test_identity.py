"""A bearer token makes its bearer somebody only where everything about it holds; whatever else is a problem, by name."""

import asyncio
import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.issuer import AUDIENCE, Issuer, issuing, rsa_key
from tollway.connectors.bindings import Bindings
from tollway.connectors.denied import Denied
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.identity import Bearer
from tollway.connectors.jwks import BYTES_MAX, Jwks, keys_of
from tollway.connectors.principal import ClaimedAccount, Principal, bearer_of, bound_by, principal, pseudonym


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as found:
        yield found


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def bearer(issuer: Issuer, clock: Clock | None = None, **arguments: Any) -> Bearer:
    jwks = Jwks(issuer.jwks_url, clock_s=clock or time.monotonic)
    fixed = {"issuer": issuer.url, "audience": AUDIENCE, "directory": ClaimedAccount("org")}
    return Bearer(**{**fixed, "jwks": jwks, **arguments})


async def refusal(who: Bearer, authorization: str | None) -> Denied:
    with pytest.raises(Denied) as raised:
        await who.identify(authorization)
    return raised.value


async def test_a_good_token_is_somebody(issuer: Issuer) -> None:
    """The account is the claimed one, the principal a pseudonym that is always the same and does not show the subject."""
    who = bearer(issuer)
    found = await who.identify(f"Bearer {issuer.token('k1')}")
    assert found == Principal("user", pseudonym(issuer.url, "u-1"), "acme")
    assert await who.identify(f"bearer {issuer.token('k1')}") == found
    assert "u-1" not in found.id
    assert pseudonym("a", "bc") != pseudonym("ab", "c")


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"sub": "u-1", "client_id": "app"}, ("user", "u-1")),
        ({"sub": "app", "client_id": "app"}, ("client", "app")),
        ({"sub": "app@clients", "azp": "app"}, ("client", "app")),
        ({"sub": "x", "client_id": "app", "gty": "client-credentials"}, ("client", "app")),
        ({"sub": "x", "azp": "app", "idtyp": "app"}, ("client", "app")),
        ({"client_id": "app"}, ("client", "app")),
        ({"sub": "u-1", "client_id": 7}, ("user", "u-1")),
    ],
)
def test_a_client_is_no_user(claims: dict[str, Any], expected: tuple[str, str]) -> None:
    """Client credentials are told from a user's token as issuers say it."""
    assert bearer_of({"iss": "i", **claims}) == ("i", *expected)


def encoded(header: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()


def unsigned(issuer: Issuer) -> str:
    return f"{encoded({'alg': 'none', 'typ': 'JWT', 'kid': 'k1'})}.{issuer.token('k1').split('.')[1]}."


def by_shared_secret(issuer: Issuer) -> str:
    """Signed with the public key as if it were a shared secret."""
    secret = issuer.keys["k1"].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{encoded({'alg': 'HS256', 'kid': 'k1'})}.{issuer.token('k1').split('.')[1]}"
    digest = hmac.digest(secret, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def tampered(issuer: Issuer) -> str:
    header, _, signature = issuer.token("k1").split(".")
    return f"{header}.{issuer.token('k1', org='globex').split('.')[1]}.{signature}"


NOW = int(time.time())
WRONG: list[tuple[str, Any]] = [
    ("expired", lambda i: i.token("k1", exp=NOW - 60)),
    ("wrong_audience", lambda i: i.token("k1", aud="https://other.example")),
    ("missing_claim", lambda i: i.token("k1", aud=None)),
    ("missing_claim", lambda i: i.token("k1", exp=None)),
    ("missing_claim", lambda i: i.token("k1", sub=None)),
    ("wrong_issuer", lambda i: i.token("k1", iss="https://evil.example")),
    ("not_yet_valid", lambda i: i.token("k1", nbf=NOW + 3_600)),
    ("unknown_key", lambda i: i.token("k1", headers={"kid": "k9"})),
    ("algorithm", unsigned),
    ("algorithm", by_shared_secret),
    ("malformed_token", lambda i: i.token("k1", headers={"crit": ["urn:x"], "urn:x": 1})),
    ("bad_signature", tampered),
    ("malformed_token", lambda i: "not.a.token"),
    ("malformed_token", lambda i: ""),
    ("malformed_token", lambda i: "a" * 20_000),
]


@pytest.mark.parametrize(("reason", "make"), WRONG)
async def test_a_token_that_is_wrong_is_refused_by_name(issuer: Issuer, reason: str, make: Any) -> None:
    """401, a problem that names what is wrong, and the challenge of RFC 6750; the token itself is told nowhere."""
    token = make(issuer)
    denied = await refusal(bearer(issuer), f"Bearer {token}")
    assert (denied.status, denied.problem["reason"], denied.usage_status) == (401, reason, "denied")
    challenge = dict(denied.headers)["WWW-Authenticate"]
    assert challenge.startswith('Bearer realm="tollway", error="invalid_token", error_description="')
    assert not token or token not in json.dumps(denied.problem) + challenge


async def test_clocks_may_differ_by_the_leeway(issuer: Issuer) -> None:
    """A token that expired less than leeway_s ago is good, one beyond it is not."""
    now = int(time.time())
    just, long_ago = issuer.token("k1", exp=now - 20), issuer.token("k1", exp=now - 40)
    assert await bearer(issuer).identify(f"Bearer {just}")
    assert (await refusal(bearer(issuer), f"Bearer {long_ago}")).reason == "expired"
    assert (await refusal(bearer(issuer, leeway_s=5), f"Bearer {just}")).reason == "expired"


async def test_no_token_is_anonymous_or_refused(issuer: Issuer) -> None:
    """Without a bearer token it is the anonymous principal where there is one; a wrong token never is."""
    stranger = Principal("anonymous", "web", "public")
    lax = bearer(issuer, anonymous=stranger)
    assert [await lax.identify(value) for value in (None, "", "Basic eDp5")] == [stranger] * 3
    assert (await refusal(lax, "Bearer nonsense")).reason == "malformed_token"
    denied = await refusal(bearer(issuer), None)
    assert (denied.status, denied.reason, dict(denied.headers)) == (
        401, "no_token", {"WWW-Authenticate": 'Bearer realm="tollway"'},
    )  # fmt: skip


async def test_a_token_type_is_asked_for(issuer: Issuer) -> None:
    """Where access tokens have a type of their own, an identity token of the same audience is refused."""
    who = bearer(issuer, token_type="at+jwt")
    assert await who.identify(f"Bearer {issuer.token('k1', headers={'typ': 'application/at+JWT'})}")
    assert (await refusal(who, f"Bearer {issuer.token('k1')}")).reason == "wrong_type"


async def test_a_rotated_key_is_known_at_its_first_token(issuer: Issuer) -> None:
    """A token signed by a new key makes the key set be read again at once; tokens of the old key are then refused."""
    clock = Clock()
    who = bearer(issuer, clock)
    old = issuer.token("k1")
    assert await who.identify(f"Bearer {old}")
    issuer.rotate("k2")
    clock.now += 11
    assert await who.identify(f"Bearer {issuer.token('k2')}")
    assert (await refusal(who, f"Bearer {old}")).reason == "unknown_key"


async def test_a_withdrawn_key_ends_with_its_time(issuer: Issuer) -> None:
    """A key that the issuer withdrew without signing by a new one is refused after ttl_s and one fetch."""
    clock = Clock()
    who = bearer(issuer, clock)
    old = f"Bearer {issuer.token('k1')}"
    assert await who.identify(old)
    issuer.rotate("k2")
    clock.now += 301
    deadline = time.monotonic() + 20
    assert await who.identify(old)  # the last one: the fetch is under way
    while who.jwks.fetches < 2 or who.jwks._fetching is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert (await refusal(who, old)).reason == "unknown_key"


async def test_another_key_under_the_same_id(issuer: Issuer) -> None:
    """A key that was replaced under its id verifies nothing any more once the set has been read again."""
    clock = Clock()
    who = bearer(issuer, clock)
    old = f"Bearer {issuer.token('k1')}"
    assert await who.identify(old)
    issuer.replace("k1", rsa_key("another", 2048))
    clock.now += 11
    assert (await refusal(who, f"Bearer {issuer.token('k1', headers={'kid': 'k9'})}")).reason == "unknown_key"
    assert (await refusal(who, old)).reason == "bad_signature"
    assert await who.identify(f"Bearer {issuer.token('k1')}")


async def test_unknown_keys_cannot_make_a_flood(issuer: Issuer) -> None:
    """A hundred tokens of a hundred unknown keys ask the issuer once within retry_s, also all at once."""
    clock = Clock()
    who = bearer(issuer, clock)
    tokens = [issuer.token("k1", headers={"kid": f"k{n}"}) for n in range(100, 200)]
    await asyncio.gather(*(refusal(who, f"Bearer {token}") for token in tokens))
    for token in tokens:
        await refusal(who, f"Bearer {token}")
    assert issuer.asked == 1
    clock.now += 11
    await refusal(who, f"Bearer {tokens[0]}")
    assert issuer.asked == 2


@pytest.mark.parametrize("retry_s", [0.0, 10.0])
async def test_one_fetch_serves_all_who_wait(issuer: Issuer, retry_s: float) -> None:
    """Requests that need the keys at once share one fetch; one that is given up takes nothing from the others."""
    issuer.gate = threading.Event()
    who, token = bearer(issuer, jwks=Jwks(issuer.jwks_url, retry_s=retry_s)), issuer.token("k1")
    tasks = [asyncio.create_task(who.identify(f"Bearer {token}")) for _ in range(20)]
    deadline = time.monotonic() + 20
    while not issuer.asked:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    tasks[0].cancel()
    issuer.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert len({str(one) for one in found[1:]}) == 1
    assert isinstance(found[1], Principal)
    assert issuer.asked == 1


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ((500, b""), "Internal Server Error"),
        ((302, b""), "Found"),
        ((200, b"<html>"), "Expecting value"),
        ((200, b"[]"), "no JSON Web Key Set"),
        ((200, b'{"keys": []}'), "no keys"),
        ((200, b"[" * 100_000), "JSON|recursion|Expecting"),
        ((200, b" " * (BYTES_MAX + 1)), "more than"),
    ],
)
async def test_an_issuer_that_does_not_answer_well_is_away(
    issuer: Issuer, answer: tuple[int, bytes], word: str
) -> None:
    """503 with Retry-After, never somebody and never 401: the token may be good. Known keys go on for a day."""
    clock = Clock()
    who, token = bearer(issuer, clock), f"Bearer {issuer.token('k1')}"
    issuer.answer = answer
    denied = await refusal(who, token)
    assert (denied.status, denied.reason, denied.usage_status) == (503, "keys", "denied")
    assert "Retry-After" in dict(denied.headers)
    with pytest.raises(Unavailable, match=word):
        await who.jwks.key("k1", "RS256")
    issuer.answer, clock.now = None, clock.now + 11
    assert await who.identify(token)
    issuer.answer, clock.now = answer, clock.now + 86_000
    assert await who.identify(token)
    clock.now += 86_500
    assert (await refusal(who, token)).status == 503


async def test_an_issuer_that_is_gone_is_away(issuer: Issuer) -> None:
    """Nobody listening is an outage as well, with its own words."""
    who = bearer(issuer, jwks=Jwks("http://127.0.0.1:9/jwks"))
    assert (await refusal(who, f"Bearer {issuer.token('k1')}")).status == 503
    assert "refused" in (who.jwks.problem or "")


async def test_keys_are_for_their_algorithm(issuer: Issuer) -> None:
    """An EC key signs beside an RSA key; a key that names another algorithm, or is too short, verifies nothing."""
    issuer.rotate_ec("e1")
    who = bearer(issuer)
    assert await who.identify(f"Bearer {issuer.token('e1')}")
    assert await who.jwks.key("e1", "RS256") is None
    issuer.rotate("weak", keep=True, bits=1024)
    assert (await refusal(bearer(issuer), f"Bearer {issuer.token('weak')}")).reason == "algorithm"
    issuer.published[0]["alg"] = "RS512"
    assert (await refusal(bearer(issuer), f"Bearer {issuer.token('k1')}")).reason == "unknown_key"


async def test_a_token_without_a_key_id(issuer: Issuer) -> None:
    """It is checked with the issuer's key where that has only one."""
    nameless = issuer.token("k1", headers={"kid": ""})
    assert await bearer(issuer).identify(f"Bearer {nameless}")
    issuer.rotate_ec("e1")
    assert (await refusal(bearer(issuer), f"Bearer {nameless}")).reason == "unknown_key"


def test_what_is_no_signature_key_is_passed_over() -> None:
    """Shared secrets, keys for encryption and rubbish in a set are not read."""
    rows = [
        {"kty": "oct", "kid": "a", "k": "AA"},
        {"kty": "RSA", "kid": "b", "use": "enc"},
        7,
        {"kty": "EC", "kid": "c"},
    ]
    assert list(keys_of(json.dumps({"keys": rows}).encode())) == ["c"]


async def test_strangers_and_a_directory_that_is_away(issuer: Issuer) -> None:
    """A valid token that is bound to nobody is 403; a directory that cannot say is 503."""
    token = f"Bearer {issuer.token('k1', org=None)}"
    assert (await refusal(bearer(issuer), token)).status == 403

    async def away(claims: Any) -> Principal | None:
        raise Unavailable("Redis does not answer")

    denied = await refusal(bearer(issuer, directory=away), token)
    assert (denied.status, denied.reason) == (503, "directory")


async def test_signed_bindings_are_a_directory(issuer: Issuer, valkey: Any) -> None:
    """What the fold wrote of `principal.bind` is who a token's bearer is, with its agents and operations."""
    from redis.asyncio import Redis

    from tollway.connectors.bindings import BindingsWriter, Told

    client = Redis.from_url(valkey.url)
    try:
        told = Told(issuer.url, "client", "app", "acme", "c-app", ["agent:helpdesk"], ["GET /search", "get_*"], 1, 1)
        await BindingsWriter(client, f"epoch-{issuer.url}", 1).write(0, [told], "1")
        who = bearer(issuer, directory=bound_by(Bindings(client)))
        found = await who.identify(f"Bearer {issuer.token('k1', sub='app', client_id='app')}")
        assert found == Principal("client", "c-app", "acme", ("agent:helpdesk",), ("GET /search", "get_*"))
        assert [found.may(name) for name in ("GET /search", "GET /searches", "get_forecast")] == [True, False, True]
    finally:
        await client.aclose()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithms": ["none"]}, "algorithms has 'none': give some of"),
        ({"algorithms": ["RS256", "HS256"]}, "algorithms has 'HS256'"),
        ({"audience": ""}, "issuer, audience or algorithms is empty"),
        (
            {"jwks": "http://keys.example/jwks"},
            "url is 'http://keys.example/jwks': give the issuer's jwks_uri, with https",
        ),
        ({"jwks": "file:///etc/keys"}, "with https"),
    ],
)
def test_a_lax_configuration_is_refused(issuer: Issuer, arguments: dict[str, Any], message: str) -> None:
    """What would let anybody be somebody is refused by name, value and cure."""
    with pytest.raises(Refused, match=message):
        bearer(issuer, **arguments)


def test_a_principal_is_checked() -> None:
    """A principal that could not be recorded is refused where it is made."""
    assert principal("user", "u-1", "acme") == Principal("user", "u-1", "acme")
    with pytest.raises(Refused, match="id is 'a b': ids match"):
        principal("user", "a b", "acme")
    with pytest.raises(Refused, match="kind is 'robot': give one of"):
        principal("robot", "a", "acme")
