"""The client of the fold's scripts on a real Valkey, and the reader of what gates see."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.batches import NOW_S
from tests.lane_model import packed
from tollway.connectors import redis as far_redis
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer, binary
from tollway.connectors.errors import Refused, Unavailable
from tollway.connectors.redis import APPLY, REWRITE_BEGIN, SWEEP, Answer, fly
from tollway.schemas.lane import lane, tag

NUMBER, EPOCH = 42, "0-log"
NOW_MS = NOW_S * 1000
BIG = 9_007_199_254_740_993  # 2⁵³ + 1: no double holds it


@pytest.fixture
async def far(valkey: ValkeyServer) -> AsyncIterator[Any]:
    found = far_redis.connect(valkey.url)
    await found.flushdb()
    yield found
    await found.aclose()


async def test_calls_fly_together_and_load_missing_scripts(far: Any) -> None:
    """Packed calls on several lanes go out together; scripts that Redis has forgotten are loaded on the way."""
    await far.script_flush()
    began = [Answer.read(reply) for reply in await fly(far, [REWRITE_BEGIN.call(n, EPOCH, 0) for n in (1, 2, 3)])]
    assert [answer.word for answer in began] == ["OK"] * 3
    body = packed([[["acme~acct", "calls L:0 u", str(BIG)]], [], [], []])
    replies = await fly(far, [APPLY.call(n, EPOCH, 4, "t", 0, "", "", NOW_MS, body) for n in (1, 2, 9)])
    assert [Answer.read(reply).word for reply in replies] == ["OK", "OK", "LOST"]
    assert await far.hget(f"{tag(2)}s:acme~acct", "calls L:0 u") == str(BIG).encode()
    assert Answer.read(replies[2]) == Answer("LOST", -1, "", -1, -1)


async def test_a_failed_script_is_unavailable_and_the_connection_stays_usable(far: Any) -> None:
    """An error reply is raised as Unavailable after all replies were read: the next call does not get a stale one."""
    await fly(far, [REWRITE_BEGIN.call(NUMBER, EPOCH, 0)])
    broken = APPLY.call(NUMBER, EPOCH, 1, "t", 0, "", "", NOW_MS, b"\xc1")
    with pytest.raises(Unavailable):
        await fly(far, [broken, REWRITE_BEGIN.call(1, EPOCH, 0)])
    assert Answer.read((await fly(far, [REWRITE_BEGIN.call(2, EPOCH, 0)]))[0]).word == "OK"


async def test_a_redis_that_is_away_is_unavailable() -> None:
    """No server on the port: Unavailable, which the view retries."""
    away = far_redis.connect(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(Unavailable):
        await fly(away, [SWEEP.call(0, 1)])
    with pytest.raises(Unavailable):
        await far_redis.check(away)
    await away.aclose()


async def test_a_redis_that_may_forget_is_refused(tmp_path: Path) -> None:
    """Eviction or no append-only file: refused by name with the cure, unless the caller says that it may forget."""
    with ValkeyServer(tmp_path) as server:
        client = far_redis.connect(server.url)
        await far_redis.check(client)
        await client.config_set("appendonly", "no")
        with pytest.raises(Refused, match="appendonly no: set it to yes"):
            await far_redis.check(client)
        await client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(Refused, match="maxmemory-policy allkeys-lru: set it to noeviction"):
            await far_redis.check(client)
        await far_redis.check(client, allow_volatile=True)
        await client.aclose()
        wrong = far_redis.connect(server.url.replace(server.password, "wrong"))
        with pytest.raises(Refused, match="TOLLWAY_REDIS_URL"):
            await far_redis.check(wrong)
        await wrong.aclose()


@pytest.fixture
def cluster_port(tmp_path: Path) -> Iterator[int]:
    """A node in cluster mode that owns no slot yet."""
    port = free_port()
    # By default the bus takes port + 10,000, which lies among the ports of outgoing connections and may be taken.
    words = f"--port {port} --bind 127.0.0.1 --cluster-enabled yes --cluster-port {free_port()} --dir {tmp_path}"
    process = subprocess.Popen([binary(), *words.split(), "--appendonly", "no"], stdout=subprocess.DEVNULL)
    yield port
    process.kill()
    process.wait()


async def test_a_cluster_node_takes_the_scripts(cluster_port: int) -> None:
    """A node in cluster mode accepts keys that a script builds with its lane's tag: one slot a lane."""
    client = far_redis.connect(f"redis://127.0.0.1:{cluster_port}/0")
    await until_answers(client)
    await client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
    await until_answers(client, b"cluster_state:ok")
    await fly(client, [REWRITE_BEGIN.call(NUMBER, EPOCH, 0)])
    body = packed([[], [[NOW_S, "acme~acct", "calls h:0 u", "1"]], [["acme", "v", "1"]], ["h1"]])
    reply = await fly(client, [APPLY.call(NUMBER, EPOCH, 1, "t", 0, "", "", NOW_MS, body), SWEEP.call(NUMBER, 9)])
    assert reply[0][0] == b"OK"
    assert await client.hget(f"{tag(NUMBER)}s:acme~acct", "calls h:0 u") == b"1"
    await client.aclose()


async def until_answers(client: Any, words: bytes = b"") -> None:
    """Wait until CLUSTER INFO has these words."""
    deadline = time.monotonic() + 20
    found = None
    while found is None or words not in found:
        assert time.monotonic() < deadline, "the node did not answer"
        try:
            found = await client.execute_command("CLUSTER", "INFO")
        except redis.RedisError:
            found = None
        await asyncio.sleep(0.02)


async def test_read_quota_tells_used_held_and_limit(far: Any) -> None:
    """What the CLI shows: per scope, meter, window and start what is used, held and allowed, and the lane's state."""
    number = lane("acme")
    empty = await far_redis.read_quota(far, "acme")
    assert (empty["state"], empty["staleness_ms"], empty["totals"]) == ("COLD", None, [])
    await fly(far, [REWRITE_BEGIN.call(number, EPOCH, 7)])
    policy = ["acme", "v", "3", "user|calls|h", "10", "user:u2|calls|h", str(BIG)]
    totals = [["acme~user:u1", f"calls h:{NOW_S} u", "4"], ["acme~user:u2", f"calls h:{NOW_S} u", str(BIG)]]
    body = packed([[*totals, ["acme2~acct", "calls L:0 u", "1"]], [], [policy], []])
    await fly(far, [APPLY.call(number, EPOCH, 7, "t", 0, "", "", NOW_MS, body)])
    await far.hset(f"{tag(number)}s:acme~user:u1", f"calls h:{NOW_S} h", "2")
    found = await far_redis.read_quota(far, "acme")
    assert (found["lane"], found["state"], found["offset"], found["log_time_ms"]) == (number, "COLD", 7, NOW_MS)
    assert found["policy"] == {"v": "3"}
    rows = [(row["scope"], row["start"], row["used"], row["held"], row["limit"]) for row in found["totals"]]
    assert rows == [("user:u1", NOW_S, 4, 2, 10), ("user:u2", NOW_S, BIG, 0, BIG)]
