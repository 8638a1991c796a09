"""A schema registry with Confluent's API (Confluent, Apicurio, Karapace …): read what it has, add a version, set its rule."""

import base64
import json
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tollway.connectors.errors import Refused, Unavailable

TIMEOUT_S = 10.0
ANSWER_BYTES_MAX = 4 << 20
SAID_MAX = 300
NO_SUBJECT, NO_CONFIG = 40401, 40408
_TYPE = "application/vnd.schemaregistry.v1+json"


class Registry:
    """One registry. Use it as an async context manager.

    Every method raises Unavailable where it does not answer, Refused in one sentence with the cure where it refuses.
    """

    def __init__(
        self,
        url: str,
        user: str = "",
        password: str = "",
        *,
        ca_file: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Accept": f"{_TYPE}, application/json"}
        if user:
            self._headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        self._ca_file, self._timeout_s = ca_file, timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        try:
            tls: ssl.SSLContext | bool = ssl.create_default_context(cafile=self._ca_file) if self._ca_file else True
        except OSError as error:
            raise Refused(f"TOLLWAY_SCHEMA_REGISTRY_CA_FILE is {self._ca_file}: {error}; give a PEM file") from error
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def schemas(self, subject: str) -> list[str]:
        """Texts of a subject's versions, oldest first; none where there is no such subject."""
        numbers = await self._ask("GET", f"/subjects/{subject}/versions", missing=NO_SUBJECT) or []
        texts = []
        for number in numbers:
            found = await self._ask("GET", f"/subjects/{subject}/versions/{number}")
            texts.append(str(found["schema"]))
        return texts

    async def rule(self, subject: str) -> str | None:
        """The subject's own compatibility level; None where it has the registry's."""
        found = await self._ask("GET", f"/config/{subject}", missing=NO_CONFIG)
        return str(found["compatibilityLevel"]) if found else None

    async def set_rule(self, subject: str, level: str) -> None:
        """What a further version must be compatible with."""
        await self._ask("PUT", f"/config/{subject}", {"compatibility": level})

    async def publish(self, subject: str, text: str) -> None:
        """Add a version; the same text again adds nothing. Refused where it breaks the subject's rule."""
        await self._ask("POST", f"/subjects/{subject}/versions", {"schema": text, "schemaType": "AVRO"})

    async def _ask(self, method: str, path: str, body: Any = None, *, missing: int = 0) -> Any:
        assert self._session is not None, "use it as a context manager"
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=None if body is None else json.dumps(body),
                headers={"Content-Type": _TYPE},
            ) as answer:
                said = (await answer.content.read(ANSWER_BYTES_MAX)).decode(errors="replace")
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreached(error) from error
        except ValueError as error:
            raise Refused(
                f"TOLLWAY_SCHEMA_REGISTRY_URL is {self.url!r}, no address: {error}; write http://host:port"
            ) from error
        found = _json(said)
        if status == 200 and found is not None:
            return found
        if status == 404 and missing and _code(found) in (missing, NO_SUBJECT):
            return None
        raise self._refused(status, found, said, path)

    def _unreached(self, error: Exception) -> Exception:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return Refused(
                f"the certificate of the schema registry at {self.url} is not trusted ({error.certificate_error}):"
                " correct TOLLWAY_SCHEMA_REGISTRY_CA_FILE"
            )
        return Unavailable(f"no schema registry at {self.url}: {error or type(error).__name__}")

    def _refused(self, status: int, found: Any, said: str, path: str) -> Exception:
        place = f"the schema registry at {self.url}"
        message = found.get("message") if isinstance(found, dict) else None
        text = " ".join(str(message or said).split())[:SAID_MAX]
        if status in (401, 403):
            return Refused(
                f"{place} refuses this user ({status} at {path}): correct TOLLWAY_SCHEMA_REGISTRY_USER and _PASSWORD,"
                " and its rights"
            )
        if status in (409, 422):
            return Refused(
                f"{place} refuses {path.split('/')[2]} ({status}: {text}): make it compatible, or its rule right"
            )
        if status >= 500:
            return Unavailable(f"{place} fails ({status}): {text}")
        return Refused(
            f"TOLLWAY_SCHEMA_REGISTRY_URL is {self.url}, which does not answer as a registry ({status}: {text}):"
            " give the address of Confluent's API; Apicurio's ends with /apis/ccompat/v7"
        )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _code(found: Any) -> int:
    return int(found.get("error_code", 0)) if isinstance(found, dict) else 0
