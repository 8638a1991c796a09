"""What the fold's totals cost Valkey: `apply` as group accounts calls it at 50,000 events a second, and a gate beside it.

Twenty turns a second over all lanes, each with the totals that 2,500 events touch: 5,000 principals by Zipf's law in 500
accounts, four windows each, as the default policy counts. Calls fly eight at a time with a thousand totals at most. The gate
asks for two limits, open loop; each ask is captured. Valkey's share is what the kernel counted for its process.
"""

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np

from benchmarks import part
from benchmarks.machine import cpu_s, say
from benchmarks.part import Size
from benchmarks.traffic import ZIPF
from tollway.connectors import redis as far
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.emitter import Emitted
from tollway.connectors.gate import Ask, Gate, scopes_of
from tollway.connectors.redis import APPLY, FLIGHT_CALLS_MAX, REWRITE_BEGIN, REWRITE_END, Answer, fly
from tollway.schemas.lane import LANES, lane
from tollway.streams.policy import gate_fields
from tollway.streams.quota_lots import WEIGHT_MAX
from tollway.streams.quota_view import PACE_S

SIZES = [
    Size("rate", 50_000, 10_000, "events a second that the totals are those of"),
    Size("asks", 500, 200, "gate: asks a second"),
    Size("seconds", 10.0, 4.0, "how long, without a gate and with one"),
]
EPOCH, PRINCIPALS, EACH = "0-log", 5_000, 10
WINDOWS = ("m", "h", "d", "M")
LIMIT = 10**15
POLICY = {
    "limits": [{"scope": kind, "meter": "calls", "window": "d", "limit": LIMIT} for kind in ("acct", "user")],
    "outage": "closed",
    "max_staleness_s": 3_600,
}
ACCOUNTS = [f"a{number:04d}" for number in range(PRINCIPALS // EACH)]


async def opened(url: str) -> None:
    """All lanes READY, with their accounts' policies."""
    client, now_ms = far.connect(url), int(time.time() * 1000)
    homes = defaultdict(list)
    for account in ACCOUNTS:
        homes[lane(account)].append([account, *gate_fields(POLICY, 1, False)])
    for number in range(LANES):
        gen = Answer.read((await fly(client, [REWRITE_BEGIN.call(number, EPOCH, 0)]))[0]).gen
        body = msgpack.packb([[], [], homes[number], []])
        await fly(client, [APPLY.call(number, EPOCH, 0, "t", 0, "", "", now_ms, body)])
        await fly(client, [REWRITE_END.call(number, EPOCH, gen, 0)])
    await client.aclose()


def touched(random: np.random.Generator, weights: Any, events: int) -> dict[int, list[list[str]]]:
    """lane → runs of totals that so many events have changed."""
    now_s = int(time.time())
    fields = [
        f"calls {window}:{now_s // size * size} u"
        for window, size in zip(WINDOWS, (60, 3_600, 86_400, 86_400), strict=True)
    ]
    runs: dict[int, list[list[str]]] = defaultdict(list)
    who = np.unique(random.choice(PRINCIPALS, events, p=weights)).tolist()
    total = str(time.time_ns() // 1_000_000)
    for scope in [
        *(f"{ACCOUNTS[n // EACH]}~user:p{n}" for n in who),
        *(f"{ACCOUNTS[n]}~acct" for n in {n // EACH for n in who}),
    ]:
        runs[lane(scope.partition("~")[0])].append([scope, *(text for field in fields for text in (field, total))])
    return runs


def flights(calls: list[tuple[bytes, int]]) -> Iterator[list[bytes]]:
    """At most eight calls and a thousand totals at once, as the quota view sends them."""
    flight: list[bytes] = []
    weight = 0
    for call, totals in calls:
        if flight and (len(flight) == FLIGHT_CALLS_MAX or weight + totals > WEIGHT_MAX):
            yield flight
            flight, weight = [], 0
        flight.append(call)
        weight += totals
    if flight:
        yield flight


def apply_totals(url: str, rate: int, seconds: float, told: Any) -> None:
    """A process of its own."""
    told.put(asyncio.run(_apply_totals(url, rate, seconds)))


async def _apply_totals(url: str, rate: int, seconds: float) -> dict[str, float]:
    client, random = far.connect(url), np.random.default_rng(1)
    weights = 1 / np.arange(1, PRINCIPALS + 1) ** ZIPF
    weights /= weights.sum()
    began, turn, totals, calls_sent, late_s = time.perf_counter(), 0, 0, 0, 0.0
    while (now := time.perf_counter() - began) < seconds:
        if now < turn * PACE_S:
            await asyncio.sleep(turn * PACE_S - now)
        late_s = max(late_s, now - turn * PACE_S)
        turn += 1
        calls = []
        for number, runs in touched(random, weights, int(rate * PACE_S)).items():
            body, count = msgpack.packb([runs, [], [], []]), sum(len(run) // 2 for run in runs)
            call = APPLY.call(number, EPOCH, turn, f"t{turn}", 0, "", "", int(time.time() * 1000), body)
            calls.append((call, count))
            totals += count
        calls_sent += len(calls)
        for flight in flights(calls):
            await fly(client, flight)
    await client.aclose()
    return {"totals_a_second": totals / now, "calls_a_second": calls_sent / now, "turns": turn, "late_s": late_s}


async def gate_asks(url: str, rate: int, seconds: float) -> list[float]:
    """Seconds of each authorize, asked when it is due whatever the others do."""
    took: list[float] = []
    random, tasks, sequence = Random(2), set(), 0

    async with Gate(url, deadline_s=5) as gate:

        async def ask(number: int) -> None:
            account = ACCOUNTS[number // EACH]
            began = time.perf_counter()
            decision = await gate.authorize(Ask(account, scopes_of("user", f"p{number}"), {"calls": 1}))
            took.append(time.perf_counter() - began)
            assert decision.hold is not None, decision
            await gate.capture(decision.hold, {"calls": 1}, Emitted("5" * 32, lane(account), sequence))
            gate._memory.drop(decision.hold)  # as when its usage has been folded

        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:
            if sequence >= now * rate:
                await asyncio.sleep(0.001)
                continue
            sequence += 1
            tasks.add(task := asyncio.ensure_future(ask(random.randrange(PRINCIPALS))))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return took


def measure(rate: int, asks: int, seconds: float) -> dict[str, Any]:
    """Apply alone, then a gate beside it."""
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(Path(folder)) as server:
        asyncio.run(opened(server.url))
        for name in ("alone", "with_gate"):
            told = context.Queue()
            fold = context.Process(target=apply_totals, args=(server.url, rate, seconds + 2, told))
            fold.start()
            time.sleep(2)  # it has begun
            cpu, began = cpu_s(server.pid or 0), time.perf_counter()
            if name == "alone":
                time.sleep(seconds - 1)
            else:
                took = sorted(asyncio.run(gate_asks(server.url, asks, seconds - 1)))
                for word, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999)):
                    found[f"gate_{word}"] = round(took[int(len(took) * share)] * 1000, 2)
            share = (cpu_s(server.pid or 0) - cpu) / (time.perf_counter() - began)
            found[name] = {"valkey_core": round(share * 100, 1), **{k: round(v, 2) for k, v in told.get().items()}}
            fold.join()
            say(f"{name}: {found[name]}")
    return found


if __name__ == "__main__":
    sys.exit(part.run("apply", __doc__, SIZES, measure))
