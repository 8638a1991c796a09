"""The control plane's pen: signs commands and appends them to the log, each where its order counts (design §4)."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tollway.connectors.errors import Refused, Unavailable
from tollway.schemas import codec
from tollway.schemas.command import HEADER_KEY, HEADER_SIGNATURE, CommandError, body_text, check_body
from tollway.schemas.lane import lane, partition
from tollway.schemas.topics import BROADCAST, USAGE


class Signer:
    """An Ed25519 key and the id under which the log knows it."""

    def __init__(self, private: Ed25519PrivateKey, kid: str) -> None:
        self._private, self.kid = private, kid
        self.public_key = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    @classmethod
    def read(cls, path: Path, *, create: bool = False) -> "Signer":
        """The key in a file (64 hex digits, mode 0600); made where it is not there and `create` says so."""
        if not path.exists():
            if not create:
                raise Refused(f"no signing key at {path}: the control plane's key is needed to sign commands")
            seed = Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(seed.hex() + "\n", encoding="ascii")
        try:
            private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
        except ValueError as error:
            raise Refused(f"{path} is no Ed25519 key: give 64 hex digits ({error})") from error
        signer = cls(private, "")
        signer.kid = signer.public_key[:16]
        return signer

    def sign(self, value: bytes) -> bytes:
        """64 bytes over a record's value."""
        return self._private.sign(value)


def signed_record(
    signer: Signer, command_id: str, account: str, kind: str, body: dict[str, Any], signed_at_us: int
) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """(key, value, headers) of a command. Raises Refused where the fold would refuse it."""
    try:
        check_body(kind, account, body)
    except CommandError as error:
        raise Refused(str(error)) from error
    command = {
        "command_id": command_id,
        "account": account,
        "kind": kind,
        "body": body_text(body),
        "signed_at": signed_at_us,
    }
    value = codec.encode("Command", command)
    return account.encode(), value, [(HEADER_SIGNATURE, signer.sign(value)), (HEADER_KEY, signer.kid.encode())]


class Control:
    """Appends commands: an account's to its partition, a broadcast to every one."""

    def __init__(
        self,
        producer: AIOKafkaProducer,
        signer: Signer,
        partitions: int,
        new_id: Callable[[], str],
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        topic: str = USAGE.name,
    ) -> None:
        self._producer, self._signer, self._partitions, self._topic = producer, signer, partitions, topic
        self._new_id, self._clock_us = new_id, clock_us

    async def send(
        self, account: str, kind: str, body: dict[str, Any], command_id: str | None = None
    ) -> dict[int, int]:
        """Sign and append one command; returns partition → offset once every broker has it.

        Raises Refused where the fold would refuse it, Unavailable where the log is giving way to a larger one.
        """
        everywhere = account == BROADCAST
        targets = list(range(self._partitions)) if everywhere else [partition(lane(account), self._partitions)]
        return await self._append(account, kind, body, command_id or self._new_id(), targets)

    async def broadcast(self, kind: str, body: dict[str, Any], command_id: str | None = None) -> dict[int, int]:
        """Append one copy of a command to every partition."""
        return await self.send(BROADCAST, kind, body, command_id)

    async def open(self, body: dict[str, Any], partitions: list[int]) -> dict[int, int]:
        """`log.open` for partitions that have no record yet."""
        return await self._append(BROADCAST, "log.open", body, self._new_id(), partitions)

    async def _append(
        self, account: str, kind: str, body: dict[str, Any], command_id: str, targets: list[int]
    ) -> dict[int, int]:
        key, value, headers = signed_record(self._signer, command_id, account, kind, body, self._clock_us())
        sent = [
            await self._producer.send(self._topic, value, key=key, partition=target, headers=headers)
            for target in targets
        ]
        try:
            return {metadata.partition: metadata.offset for metadata in [await future for future in sent]}
        except MessageSizeTooLargeError as error:
            raise Unavailable(
                f"{self._topic} takes no commands, its log grows: say it again behind `topics grow`"
            ) from error
