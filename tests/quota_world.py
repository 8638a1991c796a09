"""One partition's log, folded into quotas, beside what Redis shows of it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgpack

from tests.batches import NOW_S, batch, counts, directory
from tollway.connectors.redis import connect
from tollway.schemas.command import LogConfig
from tollway.schemas.lane import lane, tag
from tollway.streams.directory import Directory
from tollway.streams.quota import Quota
from tollway.streams.quota_view import QuotaView
from tollway.streams.state import PartitionState

PARTITIONS = 64
ACCOUNT = "acme"
HOME = lane(ACCOUNT) % PARTITIONS
LANES = [number for number in range(256) if number % PARTITIONS == HOME]
PREFIX = tag(lane(ACCOUNT))
EPOCH = "0-log"

Client = Any


class Views:
    """Started views on one Redis."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._made: list[QuotaView] = []

    async def __call__(self, url: str = "", epoch: str = EPOCH) -> QuotaView:
        view = QuotaView(connect(url or self._url, timeout_s=2), epoch, pace_s=0.0)
        await view.start()
        self._made.append(view)
        return view

    async def close(self) -> None:
        for view in self._made:
            await view.close()


class Log:
    """One partition's log of one account's usage, folded; `dump` and `load` are its checkpoint."""

    def __init__(self, found: Directory | None = None) -> None:
        found = found or directory(
            {ACCOUNT: counts(("calls", "mhL", ["acct", "user"]), limits=[("acct", "calls", "h", 9)])}
        )
        self.state = PartitionState(HOME, PARTITIONS, EPOCH, directory=found, parts={"quota": Quota()})
        self.state.directory.config = LogConfig(EPOCH, "test", "kid", "00" * 32)
        self.at(NOW_S)

    @property
    def quota(self) -> Quota:
        found: Quota = self.state.parts["quota"]
        return found

    def at(self, log_s: int) -> None:
        """Log time moves on, by a tick."""
        self.state.log_time_ms = log_s * 1000
        self.state.next_offset += 1
        if self.state.step_of(log_s * 1000) != self.state.step:
            self.state.step = self.state.step_of(log_s * 1000)
            self.quota.on_step(self.state.step * self.state.step_s)

    def fold(self, *events: dict[str, Any]) -> None:
        self.quota.fold(self.state.directory, batch(events, append_s=self.state.log_time_ms // 1000))
        self.state.next_offset += len(events)

    def dump(self) -> tuple[Any, int, int]:
        return msgpack.packb(self.quota.dump()), self.state.next_offset, self.state.log_time_ms

    @classmethod
    def load(cls, dumped: tuple[Any, int, int], found: Directory) -> "Log":
        log = cls(found)
        log.state.parts["quota"] = Quota.load(msgpack.unpackb(dumped[0]))
        log.state.next_offset, log.state.log_time_ms = dumped[1:]
        log.state.step = log.state.step_of(dumped[2])
        return log

    def totals(self) -> dict[tuple[str, str], str]:
        return {
            (scope, f"{meter} {window}:{start} u"): str(units)
            for (scope, meter, window, start), units in self.quota.totals(ACCOUNT).items()
        }


def shown(client: Client) -> dict[tuple[str, str], str]:
    """Every ` u` field that Redis has."""
    return {
        (key.decode().split("~", 1)[1], name.decode()): value.decode()
        for key in client.scan_iter("tw:{*}:s:*")
        for name, value in client.hgetall(key).items()
        if name.endswith(b" u")
    }


def meta(client: Client) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in client.hgetall(f"{PREFIX}m").items()}


async def until(holds: Callable[[], Any], what: str, deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, f"not in {deadline_s} s: {what}"
        await asyncio.sleep(0.005)


async def written(view: QuotaView, log: Log) -> None:
    """Note the log's offset and wait until Redis has all of it."""
    view.note(HOME, log.state)
    assert await view.drained(20), view.stats()
