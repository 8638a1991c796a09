"""ClickHouse's engine as a child process that serves its HTTP interface on loopback."""

import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port, write_atomically


class ClickHouseServer(Part):
    """One server with its data under `data/clickhouse`; port and password are made up unless given."""

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        *,
        user: str = "tollway",
        password: str | None = None,
        database: str = "tollway",
    ) -> None:
        super().__init__(data)
        self.host = LOOPBACK
        self.port = port or free_port()
        self.user = user
        self.password = password or secrets.token_urlsafe(24)
        self.database = database
        self._password_file = data / "clickhouse.password"

    def child(self) -> Child:
        where = ("--path", str(self.data / "clickhouse"), "--port", str(self.port), "--database", self.database)
        who = ("--user", self.user, "--password-file", str(self._password_file))
        return Child(
            "clickhouse",
            (sys.executable, "-m", "tollway.connectors.embedded.clickhouse_server", *where, *who),
            ready=self.answers,
            prepare=lambda: write_atomically(self._password_file, self.password + "\n"),
            after=("valkey",),
        )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.port}/ping", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
