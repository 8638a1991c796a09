"""An issuer of tokens on loopback: real keys, a real HTTP server for its key set, and a count of who asked."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "https://api.example"
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(kid: str, bits: int) -> rsa.RSAPrivateKey:
    """Made once a test run: it takes its time."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


class Issuer:
    """Signs tokens and publishes the keys in `published`; `answer` overrides what it publishes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: dict[str, Key] = {}
        self.published: list[dict[str, Any]] = []
        self.answer: tuple[int, bytes] | None = None
        self.gate: threading.Event | None = None
        """Answers wait for it, where it is set."""
        self.asked = 0

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/jwks"

    def rotate(self, kid: str, *, keep: bool = False, bits: int = 2048) -> None:
        """Publish a new RSA key, instead of the others or beside them."""
        self.replace(kid, rsa_key(kid, bits), keep)

    def replace(self, kid: str, key: rsa.RSAPrivateKey, keep: bool = False) -> None:
        """Publish this key under this id."""
        self.keys[kid] = key
        self.publish(kid, RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), keep)

    def rotate_ec(self, kid: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self.keys[kid] = key
        self.publish(kid, ECAlgorithm.to_jwk(key.public_key(), as_dict=True), True)

    def publish(self, kid: str, key: dict[str, Any], keep: bool) -> None:
        self.published = [*(self.published if keep else []), {**key, "kid": kid, "use": "sig"}]

    def token(self, kid: str, *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token of user u-1 for five minutes, but for the claims given; None leaves one out."""
        now = int(time.time())
        body = {"iss": self.url, "aud": AUDIENCE, "sub": "u-1", "org": "acme", "iat": now, "exp": now + 300, **claims}
        key = self.keys[kid]
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        body = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(body, key, algorithm, headers={"kid": kid, **(headers or {})})


@contextmanager
def issuing() -> Iterator[Issuer]:
    """An issuer with one key, `k1`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked += 1
            if issuer.gate is not None:
                issuer.gate.wait(30)
            overridden = issuer.answer if self.path == "/jwks" else None
            status, body = overridden or (200, json.dumps({"keys": issuer.published}).encode())
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", f"{issuer.url}/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer = Issuer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        issuer.rotate("k1")
        yield issuer
    finally:
        if issuer.gate is not None:
            issuer.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
