"""Three Valkey nodes as one cluster, for tests: the embedded binary, a third of the slots each."""

import time
from pathlib import Path
from typing import Any

import redis

from tollway.connectors.embedded.process import LOOPBACK, Child, Process, free_port, poll
from tollway.connectors.embedded.valkey import binary

NODES, SLOTS = 3, 16_384


class ValkeyCluster:
    """`start()` it, `stop()` it. `move(slot)` gives a slot to the next node while clients go on."""

    def __init__(self, folder: Path) -> None:
        self.ports = [free_port() for _ in range(NODES)]
        self._processes = [self._node(folder / f"node{n}", port) for n, port in enumerate(self.ports)]

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.ports[0]}"

    def _node(self, folder: Path, port: int) -> Process:
        folder.mkdir(parents=True)
        words = f"--port {port} --bind {LOOPBACK} --cluster-enabled yes --cluster-port {free_port()} --save".split()
        argv = (binary(), *words, "", "--dir", str(folder), "--cluster-node-timeout", "2000")
        return Process(Child(f"valkey-{port}", argv, ready=lambda: self._answers(port)), folder)

    @staticmethod
    def _answers(port: int) -> bool:
        try:
            with redis.Redis(host=LOOPBACK, port=port, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def node(self, number: int) -> Any:
        return redis.Redis(host=LOOPBACK, port=self.ports[number], socket_timeout=10, decode_responses=True)

    def start(self) -> None:
        for process in self._processes:
            process.start()
        for process in self._processes:
            process.wait_ready()
        for n in range(NODES):
            first, last = SLOTS * n // NODES, SLOTS * (n + 1) // NODES - 1
            self.node(n).execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for n in range(1, NODES):
            bus = self._bus(n)
            self.node(0).execute_command("CLUSTER", "MEET", LOOPBACK, self.ports[n], bus)
        for _ in poll(30):
            if all(self._whole(n) for n in range(NODES)):
                return
        raise AssertionError("the cluster does not come together")

    def _bus(self, n: int) -> int:
        argv = self._processes[n].child.argv
        return int(argv[argv.index("--cluster-port") + 1])

    def _whole(self, n: int) -> bool:
        info = self.node(n).execute_command("CLUSTER", "INFO")
        fields = info if isinstance(info, dict) else dict(line.split(":") for line in info.split() if ":" in line)
        return fields["cluster_state"] == "ok" and int(fields["cluster_known_nodes"]) == NODES

    def owner(self, slot: int) -> int:
        return next(n for n in range(NODES) if self._owns(n, slot))

    def _owns(self, n: int, slot: int) -> bool:
        mine = self.node(n).execute_command("CLUSTER", "MYID")
        ranges = self.node(n).execute_command("CLUSTER", "SLOTS")
        return any(first <= slot <= last and node[2] == mine for first, last, node, *_ in ranges)

    def move(self, slot: int, deadline_s: float = 30) -> None:
        """The slot goes to the next node, in one piece (Valkey 9: CLUSTER MIGRATESLOTS)."""
        source = self.owner(slot)
        target = (source + 1) % NODES
        name = self.node(target).execute_command("CLUSTER", "MYID")
        self.node(source).execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", name)
        until = time.monotonic() + deadline_s
        for _ in poll(deadline_s):
            if self._owns(target, slot):
                return
        raise AssertionError(f"slot {slot} did not move within {time.monotonic() - until + deadline_s:.0f} s")

    def stop(self) -> None:
        for process in self._processes:
            process.stop()
