"""How large a campaign is and how hard: the small one of every test run, and the whole one of a release."""

import asyncio
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from tests.prove_outages import OUTAGES, Outage
from tollway.connectors.embedded.process import Child
from tollway.connectors.embedded.stack import Endpoints, Stack
from tollway.streams import settings
from tollway.streams.local import Progress, prepare_log, worker_child

EMITTERS, THREADS = 3, 2
WHOLE_RATE = 1_400
"""Calls a second of all emitters together, which a stack on two cores carries while its parts die."""
WHOLE_TRAFFIC_LEAST_S = 300.0
"""The outages need so long."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a campaign. Emitters are paced to make their calls in `traffic_s`: kills fall into traffic, not behind it."""

    events: int
    accounts: int = 220
    principals_each: int = 10
    traffic_s: float = 90.0
    traffic_slack_s: float = 310.0
    settle_s: float = 240.0
    billing_window_s: int = 10
    billing_grace_s: int = 5
    snapshot_s: int = 60
    partitions: int = 16
    session_timeout_ms: int = 2_000
    max_poll_interval_ms: int = 300_000
    checkpoint_s: int = 3
    replicas: dict[str, int] = field(default_factory=lambda: {"accounts": 1, "audit": 1, "stripe": 1})
    kill_until: float = 0.0
    """Share of the traffic's time in which the plans of kills are begun anew."""
    outages: tuple[tuple[Outage, ...], ...] = ()

    @property
    def rate(self) -> float:
        """Calls a second, all emitters together."""
        return self.events / self.traffic_s

    def workers(self, group: str) -> list[str]:
        """Names of a group's replicas."""
        return [f"worker-{group}" + (f"-{number}" if number else "") for number in range(self.replicas[group])]


def small(events: int) -> Scale:
    """Two hundred accounts, two thousand principals, a minute and a half; workers and an emitter die."""
    return Scale(events)


def whole(events: int) -> Scale:
    """A thousand accounts, five thousand principals, two replicas; everything dies, and is away for longer than a poll."""
    return Scale(
        events,
        accounts=1_000,
        principals_each=5,
        traffic_s=max(WHOLE_TRAFFIC_LEAST_S, events / WHOLE_RATE),
        settle_s=900.0,
        billing_window_s=60,
        billing_grace_s=10,
        snapshot_s=300,
        session_timeout_ms=6_000,
        max_poll_interval_ms=30_000,
        checkpoint_s=5,
        replicas={"accounts": 2, "audit": 2, "stripe": 1},
        kill_until=0.6,
        outages=OUTAGES,
    )


def stack_of(scale: Scale, data: Path, progress: Progress) -> Stack:
    """The local stack with the replicas and settings of a scale, not started."""
    names = ("billing_window_s", "billing_grace_s", "snapshot_s", "partitions")
    windows = {name: getattr(scale, name) for name in names}

    def prepare(endpoints: Endpoints) -> None:
        del endpoints  # read back from stack.json, as every other process does
        asyncio.run(prepare_log(settings.read(data=data, **windows), progress))

    def workers(endpoints: Endpoints) -> list[Child]:
        del endpoints
        return [
            as_told(worker_child(data, group, name), scale) for group in scale.replicas for name in scale.workers(group)
        ]

    return Stack(
        data,
        workers=workers,
        prepare=prepare,
        progress=progress,
        kafka_settings={"group.min.session.timeout.ms": "500"},
    )


def as_told(child: Child, scale: Scale) -> Child:
    """A worker with the times of a scale instead of the local stack's."""
    told = {
        "TOLLWAY_SESSION_TIMEOUT_MS": scale.session_timeout_ms,
        "TOLLWAY_MAX_POLL_INTERVAL_MS": scale.max_poll_interval_ms,
        "TOLLWAY_CHECKPOINT_S": scale.checkpoint_s,
    }
    return dataclasses.replace(child, env={**child.env, **{name: str(value) for name, value in told.items()}})
