"""A producer beside the pipeline: events encoded before, sent by librdkafka at a steady rate.

As a process of its own: `python -m benchmarks.live --bootstrap … --partitions P --rate R --seconds S` makes its events, says
`ready`, waits for a line, sends, and prints {"sent", "wall_s", "cpu_s", "behind_s"}.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.site import Site
from benchmarks.traffic import OUTSTANDING_MAX, TOPIC, Shape, Traffic, producer

SERVICES = Shape("live", principals=5_000, each=10, full=True, variants=20_000)
"""500 accounts of ten principals; events with all usual fields."""
TURN_S = 0.005
LINGER_MS = 5


def send(bootstrap: str, partitions: int, rate: int, seconds: float, seed: int) -> dict[str, float]:
    """Events when they are due, until all are acknowledged; `behind_s` = how late the latest was."""
    made = Traffic(SERVICES, seed=seed, spread_us=2_000_000).events(int(rate * seconds), summed=False)
    sender = producer(bootstrap, LINGER_MS)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, began, sent, behind_s = time.process_time(), time.monotonic(), 0, 0.0
    while sent < len(made):
        due = min(len(made), int((time.monotonic() - began) * rate), sent + OUTSTANDING_MAX // 4)
        for key, value, lane in made[sent:due]:
            while True:
                try:
                    sender.produce(TOPIC, value=value, key=key, partition=lane % partitions)
                    break
                except BufferError:  # the broker is behind: what is due waits
                    sender.poll(0.01)
        sent = due
        behind_s = max(behind_s, time.monotonic() - began - sent / rate)
        sender.poll(0)
        time.sleep(TURN_S)
    if sender.flush(60):
        raise TimeoutError("the broker did not take the benchmark's events within 60 s")
    return {
        "sent": sent,
        "wall_s": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu,
        "behind_s": behind_s,
    }


class Producers:
    """Some of these processes, which together send at `rate`."""

    def __init__(self, site: Site, rate: int, seconds: float, processes: int) -> None:
        argv = [sys.executable, "-m", "benchmarks.live", "--bootstrap", site.bootstrap, "--seconds", str(seconds)]
        argv += ["--partitions", str(len(site.partitions)), "--rate", str(rate // processes)]
        self.processes = [
            subprocess.Popen([*argv, "--seed", str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for seed in range(processes)
        ]

    def wait_ready(self) -> None:
        """Until all have made their events."""
        for process in self.processes:
            assert process.stdout
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"a producer ended with {process.wait()}")

    def go(self) -> None:
        """Begin."""
        for process in self.processes:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def told(self) -> list[dict[str, float]]:
        """What each has done."""
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in self.processes]

    def kill(self) -> None:
        """Whatever still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def producers(site: Site, rate: int, seconds: float, processes: int = 1) -> Iterator[Producers]:
    """Ready to go."""
    made = Producers(site, rate, seconds, processes)
    try:
        made.wait_ready()
        yield made
    finally:
        made.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--partitions", type=int, required=True)
    parser.add_argument("--rate", type=int, required=True, help="events a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given: dict[str, Any] = vars(parser.parse_args())
    print(json.dumps(send(**given)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
