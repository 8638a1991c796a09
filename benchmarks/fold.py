"""How many events a CPU second: our accounts group beside Quix Streams and a plain loop, interleaved on one topic.

(a) the work that Quix does: one 60 s sum per principal and meter; ours with admission, de-duplication, Redis and checkpoints.
(b) ours alone: default policy, all parts, six meters.
`python -m benchmarks.fold --quix-python VENV/bin/python [--events N] [--rounds R] [--json]`. CPU seconds are those of the
client process; broker and Redis stand beside it on the same machine, so trust ratios. Medians over the rounds.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

from benchmarks.fold_load import Traffic, accounts, produce
from benchmarks.machine import cpu_s, machine, median, report, say
from tollway.connectors.control import Control, Signer
from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.kafka import started_producer
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import create, new_command_id

TOPIC, GROUP, PARTITIONS = "usage.events", "tollway.accounts", 8
DEADLINE_S = 300.0
QUIX_EVENTS_MAX = 100_000
PLAIN_EVENTS_MAX = 200_000
MINUTE_SUMS = {
    "counts": [{"meter": m, "windows": ["m"], "scopes": ["principal"]} for m in ("calls", "tokens_in", "tokens_out")]
}
BAR = 6.0
"""Ours must be at least this many times Quix's windowed sum."""


@dataclass
class Bench:
    """A broker, a Redis and a log on them."""

    kafka: KafkaBroker
    valkey: ValkeyServer
    settings: Any

    def ends(self) -> dict[int, int]:
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap, "group.id": "bench"})
        found = {
            number: consumer.get_watermark_offsets(TopicPartition(TOPIC, number), timeout=10)[1]
            for number in range(PARTITIONS)
        }
        consumer.close()
        return found

    def append(self, made: list[tuple[bytes, bytes, int]]) -> dict[int, int]:
        """Where they begin. Raises RuntimeError where the broker did not take all."""
        starts = self.ends()
        produce(self.kafka.bootstrap, PARTITIONS, made)
        taken = sum(self.ends().values()) - sum(starts.values())
        if taken != len(made):
            raise RuntimeError(f"the broker took {taken} of {len(made)} events")
        return starts

    def committed(self) -> dict[int, int]:
        """Offsets committed behind the newest checkpoints of our group."""
        client = AdminClient({"bootstrap.servers": self.kafka.bootstrap, "log_level": 0})
        asked = ConsumerGroupTopicPartitions(GROUP, [TopicPartition(TOPIC, number) for number in range(PARTITIONS)])
        found = client.list_consumer_group_offsets([asked])[GROUP].result(10)
        return {part.partition: part.offset for part in found.topic_partitions}

    async def command(self, commands: list[tuple[str, str, dict[str, Any]]]) -> None:
        producer = await started_producer(self.kafka.bootstrap, {})
        control = Control(producer, Signer.read(self.settings.data / "control.key"), PARTITIONS, new_command_id)
        try:
            for account, kind, body in commands:
                await control.send(account, kind, body)
        finally:
            await producer.stop()


def wait_for(met: Callable[[], Any], what: str) -> Any:
    """The first true answer. Raises TimeoutError."""
    until = time.monotonic() + DEADLINE_S
    while not (found := met()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {DEADLINE_S:.0f} s")
        time.sleep(0.02)
    return found


class Ours:
    """One worker of group accounts, from its newest checkpoint to the end of the topic."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.port = bench, free_port()
        environment = {
            **os.environ,
            "TOLLWAY_KAFKA_BOOTSTRAP": bench.kafka.bootstrap,
            "TOLLWAY_REDIS_URL": bench.valkey.url,
            "TOLLWAY_HEALTH_PORT": str(self.port),
            "TOLLWAY_CHECKPOINT_S": "1",
            "TOLLWAY_CHECKPOINT_RECORDS": "50000",
            "TOLLWAY_TICK_IDLE_S": "3600",
        }
        argv = [sys.executable, "-m", "tollway.streams.cli", "worker", "--group", "accounts"]
        self.log = (bench.settings.data / "worker.log").open("ab")
        self.process = subprocess.Popen(
            [*argv, "--data", str(bench.settings.data)], env=environment, stdout=self.log, stderr=self.log
        )

    def health(self) -> dict[str, Any] | None:
        """None while it is not up yet. Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the worker ended with {self.process.returncode}, see {self.log.name}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except OSError:
            return None

    def events(self) -> int:
        found = self.health()
        return sum(group["events"] for group in found["groups"]) if found else 0

    def run(self) -> dict[str, float]:
        """Events per CPU second between the first sight of progress and the last checkpoint, Redis written."""
        ends = self.bench.ends()
        try:
            first = wait_for(self.events, "the worker's first events")
            cpu, wall = cpu_s(self.process.pid), time.monotonic()
            wait_for(lambda: self.bench.committed() == ends, "the worker's last checkpoint")
            wait_for(lambda: not (self.health() or {}).get("view", {}).get("dirty", 0), "Redis")
            events, spent = self.events() - first, cpu_s(self.process.pid) - cpu
            return {"events": events, "cpu_s": spent, "wall_s": time.monotonic() - wall, "per_cpu_s": events / spent}
        finally:
            self.process.terminate()
            self.process.wait(20)
            self.log.close()


def contender(argv: list[str]) -> dict[str, float]:
    """Run one of the others in its own process."""
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=DEADLINE_S, cwd=Path(__file__).resolve().parent.parent
    )
    if done.returncode:
        raise RuntimeError(f"{argv[1]} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "per_cpu_s": found["events"] / found["cpu_s"]}


def one_round(bench: Bench, traffic: Traffic, events: int, quix_python: str, turn: int) -> dict[str, dict[str, float]]:
    """New events, then every contender over them, in an order that changes from round to round."""
    starts = bench.append(traffic.events(events, 3))
    where = ["--bootstrap", bench.kafka.bootstrap, "--starts", json.dumps(starts)]
    folder = Path(__file__).parent
    plain = [sys.executable, str(folder / "fold_plain.py"), *where, "--redis", bench.valkey.url]
    quix = [quix_python, str(folder / "fold_quix.py"), *where]
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: Ours(bench).run(),
        "plain": lambda: contender([*plain, "--events", str(min(events, PLAIN_EVENTS_MAX))]),
    }
    if quix_python:
        runs["quix"] = lambda: contender([*quix, "--events", str(min(events, QUIX_EVENTS_MAX))])
    names = list(runs)
    found = {}
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        found[name] = runs[name]()
        say(f"round {turn + 1}: {name:5} {found[name]['per_cpu_s']:>10,.0f} events per CPU second")
    return found


def figures(bench: Bench, events: int, rounds: int, quix_python: str) -> dict[str, Any]:
    """All rounds of (b), then of (a)."""
    traffic = Traffic(seed=1)
    meters = ("calls", "tokens_in", "tokens_out", "tool_calls", "vector_queries", "compute_ms")
    asyncio.run(bench.command([("*", "meter.add", {"meter": name, "event_name": f"bench_{name}"}) for name in meters]))
    wide = []
    for turn in range(rounds):
        bench.append(traffic.events(events // 2, 6))
        wide.append(Ours(bench).run())
        say(
            f"round {turn + 1}: default policy, all parts, six meters {wide[-1]['per_cpu_s']:,.0f} events per CPU second"
        )
    silent = [("*", "meter.add", {"meter": name, "event_name": None}) for name in meters]
    asyncio.run(bench.command([*silent, *((name, "policy.set", MINUTE_SUMS) for name in accounts())]))
    say("policies are set; the worker digests them")
    Ours(bench).run()
    found = [one_round(bench, traffic, events, quix_python, turn) for turn in range(rounds)]
    rates = {name: [each[name]["per_cpu_s"] for each in found] for name in found[0]}
    middle = {name: median(values) for name, values in rates.items()}
    return {
        "machine": machine(),
        "events": events,
        "rounds": rounds,
        "events_per_cpu_s": {name: round(value) for name, value in middle.items()},
        "each_round": {name: [round(value) for value in values] for name, values in rates.items()},
        "times_quix": round(middle["ours"] / middle["quix"], 2) if "quix" in middle else None,
        "times_plain": round(middle["ours"] / middle["plain"], 2),
        "default_policy_six_meters_per_cpu_s": round(median([each["per_cpu_s"] for each in wide])),
        "default_policy_each_round": [round(each["per_cpu_s"]) for each in wide],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=600_000, help="events a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quix-python", default="", help="interpreter of an environment with benchmarks/requirements.txt"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        kafka, valkey = KafkaBroker(data), ValkeyServer(data)
        try:
            for part in (kafka, valkey):
                part.start()
                part.wait_ready()
            given = {"data": data, "kafka_bootstrap": kafka.bootstrap, "redis_url": valkey.url}
            settings = settings_module.read(**given, partitions=PARTITIONS, auto_open=True)
            asyncio.run(create(settings))
            found = figures(Bench(kafka, valkey, settings), arguments.events, arguments.rounds, arguments.quix_python)
        finally:
            for part in (kafka, valkey):
                part.kill()
    report(found, arguments.json)
    if found["times_quix"] is not None and found["times_quix"] < BAR:
        say(f"ours is {found['times_quix']} x Quix's windowed sum: the bar is {BAR} x")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
