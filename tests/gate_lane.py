"""One account's lane in a real Redis, written as the fold writes it, for tests of gates."""

import time
from collections.abc import Iterable
from typing import Any

import msgpack

from tests.batches import counts
from tollway.connectors import redis as far
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP, Answer, Swept
from tollway.schemas.lane import lane, tag
from tollway.streams.policy import gate_fields

EPOCH = "0-log"
Limit = tuple[str, str, str, int]
"""scope, meter, window, limit"""


class FoldedLane:
    """What a fold would have written: `off` and log time go on with every apply."""

    def __init__(self, client: Any, account: str = "acme") -> None:
        self.client, self.account, self.number = client, account, lane(account)
        self.prefix = tag(self.number)
        self.off, self.gen = 0, 0

    async def ready(self, *limits: Limit, **policy: Any) -> None:
        """A lane that is READY, with this policy."""
        await self.begin()
        await self.apply(policy=self.fields(limits, **policy))
        await self.end()

    def fields(self, limits: Iterable[Limit], **policy: Any) -> list[str]:
        frozen, full = policy.pop("frozen", False), policy.pop("full", False)
        rule = {**counts(limits=list(limits)), "outage": "closed", "max_staleness_s": 30, **policy}
        return [self.account, *gate_fields(rule, 1, full, frozen)]

    async def begin(self) -> None:
        self.gen = (await self._answer(REWRITE_BEGIN.call(self.number, EPOCH, self.off))).gen

    async def end(self) -> None:
        assert (await self._answer(REWRITE_END.call(self.number, EPOCH, self.gen, self.off))).word == "OK"

    async def apply(
        self,
        totals: Iterable[tuple[str, str, int]] = (),
        closes: Iterable[str] = (),
        policy: list[str] | None = None,
        log_ms: int | None = None,
        records: int = 1,
    ) -> Answer:
        """totals: (scope, base, used) each, life windows; the log has `records` more."""
        self.off += records
        runs = [[f"{self.account}~{scope}", f"{base} u", str(used)] for scope, base, used in totals]
        body = msgpack.packb([runs, [], [policy] if policy else [], list(closes)])
        log = int(time.time() * 1000) if log_ms is None else log_ms
        found = await self._answer(APPLY.call(self.number, EPOCH, self.off, f"t{self.off}", 0, "", "", log, body))
        assert found.word == "OK", found
        return found

    async def sweep(self) -> Swept:
        return Swept.read((await far.fly(self.client, [SWEEP.call(self.number, 1_000)]))[0])

    async def _answer(self, call: bytes) -> Answer:
        return Answer.read((await far.fly(self.client, [call]))[0])

    async def scope(self, scope: str = "acct") -> dict[str, int]:
        """Its fields."""
        found = await self.client.hgetall(f"{self.prefix}s:{self.account}~{scope}")
        return {name.decode(): int(value) for name, value in found.items()}

    async def held(self, scope: str = "acct") -> int:
        """Sum of its ` h` fields."""
        return sum(units for name, units in (await self.scope(scope)).items() if name.endswith(" h"))

    async def keys(self) -> dict[str, bytes]:
        """The whole lane, to compare and to restore."""
        return {key.decode(): await self.client.dump(key) async for key in self.client.scan_iter(f"{self.prefix}*")}

    async def restore(self, keys: dict[str, bytes]) -> None:
        """An older copy comes back."""
        await self.client.flushdb()
        for key, value in keys.items():
            await self.client.restore(key, 0, value)
