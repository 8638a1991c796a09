"""How large a crash campaign is, how hard, and how often each group of processes is struck."""

from dataclasses import dataclass

from tests.crash_strike import Plan
from tests.crash_targets import SERVERS
from tests.prove_scale import Scale

GROUPS = ("accounts", "audit", "stripe")
SERVER_NAMES = ("valkey", "clickhouse", "stripe", "valkey", "clickhouse", "stripe", "kafka")
"""Who is struck how often: what needs the broker is everything, and all of it starts anew."""
SERVICE_SHARE = 0.25
"""Of all strikes, on emitters and on gates each: they need no partition back, and are ready again first."""
LEAST = 3
"""Strikes that are kept for each group of workers."""
WAIT_FOR_HOLDS_FROM = 200
"""A campaign of so many strikes also waits until abandoned holds have expired."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a campaign; times end in their unit."""

    kills: int
    accounts: int = 60
    principals_each: int = 3
    partitions: int = 8
    replicas: int = 2
    emitters: int = 3
    gates: int = 2
    rate: float = 220.0
    """Calls of emit() a second, all emitters together."""
    gate_rate: float = 30.0
    """Calls that gates are asked for a second."""
    session_timeout_ms: int = 1_000
    checkpoint_s: int = 2
    step_s: int = 2
    billing_window_s: int = 10
    billing_grace_s: int = 4
    snapshot_s: int = 60
    hold_grace_s: int = 60
    look_s: float = 3.0
    poison_every_s: float = 60.0
    settle_s: float = 300.0
    worker_gap_s: float = 8.0
    service_gap_s: float = 4.0
    server_gap_s: float = 15.0
    again: float = 0.3
    await_holds: bool = True

    @property
    def emitter_names(self) -> tuple[str, ...]:
        return tuple(f"e{number}" for number in range(self.emitters))

    @property
    def gate_names(self) -> tuple[str, ...]:
        return tuple(f"g{number}" for number in range(self.gates))

    def of_stack(self) -> Scale:
        """What the stack and its workers are told."""
        return Scale(
            events=0,
            accounts=self.accounts,
            principals_each=self.principals_each,
            partitions=self.partitions,
            billing_window_s=self.billing_window_s,
            billing_grace_s=self.billing_grace_s,
            snapshot_s=self.snapshot_s,
            session_timeout_ms=self.session_timeout_ms,
            checkpoint_s=self.checkpoint_s,
            replicas=dict.fromkeys(GROUPS, self.replicas),
        )

    def of_log(self) -> dict[str, str]:
        """Settings of the new log, for the environment."""
        told = {"STEP_S": self.step_s, "HOLD_GRACE_S": self.hold_grace_s}
        return {f"TOLLWAY_{name}": str(value) for name, value in told.items()}

    def plans(self) -> list[Plan]:
        """One a group of processes."""
        scale = self.of_stack()
        workers = [
            Plan(group, tuple(scale.workers(group)), self.worker_gap_s, stops=0.6, again=self.again, least=LEAST)
            for group in GROUPS
        ]
        services = [
            Plan(kind, names, self.service_gap_s, stops=0.4, again=self.again, share=SERVICE_SHARE, apart=True)
            for kind, names in (("emitters", self.emitter_names), ("gates", self.gate_names))
        ]
        return [
            *workers,
            *services,
            Plan(SERVERS, SERVER_NAMES, self.server_gap_s, stops=0.4, again=0.1, stop_s=(0.5, 2.5)),
        ]

    @property
    def processes(self) -> set[str]:
        """All that are struck."""
        return {name for plan in self.plans() for name in plan.names}


def sizes(kills: int) -> Sizes:
    """A campaign of so many strikes; a small one is denser."""
    if kills >= WAIT_FOR_HOLDS_FROM:
        return Sizes(kills)
    return Sizes(
        kills,
        accounts=40,
        emitters=2,
        gates=2,
        rate=200.0,
        gate_rate=30.0,
        billing_window_s=3,
        billing_grace_s=2,
        look_s=0.5,
        poison_every_s=20.0,
        worker_gap_s=7.0,
        service_gap_s=4.0,
        server_gap_s=9.0,
        await_holds=False,
    )
