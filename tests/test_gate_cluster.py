"""Redis Cluster: the gate's and the fold's scripts on three nodes, with a lane's slot moved while gates work."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgpack
import pytest
from redis.asyncio.cluster import RedisCluster
from redis.cluster import RedisCluster as SyncCluster
from redis.crc import key_slot

from tests.batches import counts
from tests.gate_lane import EPOCH
from tests.test_gate_model import Pair
from tests.valkey_cluster import ValkeyCluster
from tollway.connectors.emitter import Emitted
from tollway.connectors.gate import Ask, Gate, scopes_of
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END
from tollway.schemas.lane import lane, tag
from tollway.streams.policy import gate_fields

HISTORIES, STEPS = 15, 50
ACCOUNTS = ("acme", "beta", "gamma", "delta", "epsilon")
LIMITS = [(kind, "calls", "L", 1_000) for kind in ("acct", "user", "run")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    found = ValkeyCluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
async def client(cluster: ValkeyCluster) -> AsyncIterator[Any]:
    found = RedisCluster.from_url(cluster.url)
    await found.flushall(target_nodes=RedisCluster.PRIMARIES)
    yield found
    await found.aclose()


async def fold(client: Any, account: str, script: Any, *words: Any) -> list[Any]:
    """One of the fold's scripts, by the cluster's client."""
    found: list[Any] = await client.eval(script.text, 1, f"{tag(lane(account))}m", *words)
    return found


async def ready(client: Any, account: str) -> None:
    gen = (await fold(client, account, REWRITE_BEGIN, EPOCH, 0))[3]
    policy = {**counts(limits=LIMITS), "outage": "closed", "max_staleness_s": 3_600}
    await apply(client, account, 0, policies=[[account, *gate_fields(policy, 1, False)]])
    assert (await fold(client, account, REWRITE_END, EPOCH, gen, 0))[0] == b"OK"


async def apply(client: Any, account: str, off: int, totals: Any = (), closes: Any = (), policies: Any = ()) -> bytes:
    body = msgpack.packb([list(totals), [], list(policies), list(closes)])
    words = (EPOCH, off, f"t{off}", 0, "", "", int(time.time() * 1000), body)
    return bytes((await fold(client, account, APPLY, *words))[0])


async def load(client: Any, account: str, scope: str) -> dict[str, int]:
    found = await client.hgetall(f"{tag(lane(account))}s:{account}~{scope}")
    return {name.decode(): int(value) for name, value in found.items()}


def ask(account: str, units: int = 1, call: str = "") -> Ask:
    return Ask(account, scopes_of("user", "u1", run="r1"), {"calls": units}, call)


def test_the_contract_suite_passes_on_a_cluster(cluster: ValkeyCluster) -> None:
    """The model test of the gate's and the fold's scripts, on a node that a cluster's client finds."""
    with SyncCluster.from_url(cluster.url) as client:
        for seed in range(HISTORIES):
            client.flushall(target_nodes=SyncCluster.PRIMARIES)
            pair = Pair(client, seed)
            for _ in range(STEPS):
                pair.step()


async def test_every_script_works_on_every_node(cluster: ValkeyCluster, client: Any) -> None:
    """Authorize, retry, extend, capture, void, re-assert and apply give what they give on one Redis, lane by lane."""
    owners = {cluster.owner(key_slot(tag(lane(account)).encode())) for account in ACCOUNTS}
    assert len(owners) > 1
    async with Gate(RedisCluster.from_url(cluster.url), deadline_s=10) as gate:
        for account in ACCOUNTS:
            await ready(client, account)
            first = await gate.authorize(ask(account, 3, call="c1"))
            assert (first.allowed, (await gate.authorize(ask(account, 3, call="c1"))).verdict) == (True, "duplicate")
            longer = await gate.extend(first.hold, {"calls": 5})
            assert await load(client, account, "run:r1") == {"calls L:0 h": 5}
            emitted = Emitted("5" * 32, lane(account), 1)
            assert await gate.capture(longer.hold, {"calls": 4}, emitted) == "captured"
            second = await gate.authorize(ask(account, 7))
            assert await gate.void(second.hold) == "voided"
            assert not (await gate.authorize(ask(account, 997))).allowed
            totals = [[f"{account}~{scope}", "calls L:0 u", "4"] for scope in ask(account).scopes]
            assert await apply(client, account, 1, totals, [first.hold.id]) == b"OK"
            assert await load(client, account, "acct") == {"calls L:0 h": 0, "calls L:0 u": 4}


async def test_a_slot_moves_while_gates_work(cluster: ValkeyCluster, client: Any) -> None:
    """Every grant that a gate was told is held on the new node, none twice, and the limit holds on."""
    await ready(client, "acme")
    slot = key_slot(tag(lane("acme")).encode())
    source, granted, outages = cluster.owner(slot), 0, 0
    async with Gate(RedisCluster.from_url(cluster.url), deadline_s=10) as gate:
        moved = asyncio.get_running_loop().run_in_executor(None, cluster.move, slot)

        async def work() -> None:
            nonlocal granted, outages
            while not moved.done():
                decision = await gate.authorize(ask("acme"))
                granted += decision.allowed
                outages += decision.status == 503

        await asyncio.gather(*(work() for _ in range(4)))
        await moved
        assert cluster.owner(slot) != source
        assert granted > 0
        last = await gate.authorize(ask("acme"))
        assert last.allowed or last.status == 429 or granted >= 1_000
        granted += last.allowed
        held = (await load(client, "acme", "acct"))["calls L:0 h"]
        assert granted <= held <= min(1_000, granted + outages)  # an outage may have been a grant whose answer was lost
        totals = [[f"acme~{scope}", "calls L:0 u", "5"] for scope in ask("acme").scopes]
        assert await apply(client, "acme", 1, totals) == b"OK"
        assert (await load(client, "acme", "run:r1"))["calls L:0 u"] == 5
