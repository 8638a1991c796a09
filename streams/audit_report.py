"""What `audit verify` found: the faults, where they are, and how much was checked."""

from dataclasses import dataclass, field
from typing import Any

FAULTS_MAX = 1_000
"""Most faults a report names; the rest are counted."""

Place = tuple[str, int]
"""(epoch, partition)"""


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where: offsets `first` … `last` of a partition in a table (or `checkpoint`)."""

    table: str
    epoch: str
    partition: int
    first: int
    last: int
    what: str

    def __str__(self) -> str:
        return f"{self.table}, partition {self.partition} of {self.epoch}, offsets {self.first} to {self.last}: {self.what}"


@dataclass
class Report:
    """Green (`ok`) where there is no fault. Counts are of what was checked."""

    partitions: int = 0
    blocks: int = 0
    records: int = 0
    compared: int = 0
    """Rows of usage_events judged again and found equal or named."""
    tails: int = 0
    """Partitions whose newest chain value was held against Kafka's checkpoint."""
    faults: list[Fault] = field(default_factory=list)
    more_faults: int = 0
    unproven: list[str] = field(default_factory=list)
    """What could not be checked, and why."""
    chains: dict[Place, tuple[int, bytes]] = field(default_factory=dict)
    """(epoch, partition) → (next offset, chain hash) of the newest block."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def add(self, *fault: Any) -> None:
        """A fault's fields, in its order."""
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(Fault(*fault))
        else:
            self.more_faults += 1

    def to_json(self) -> dict[str, Any]:
        """For --json; `text` of a fault is for people."""
        return {
            "ok": self.ok,
            "partitions": self.partitions,
            "blocks": self.blocks,
            "records": self.records,
            "compared": self.compared,
            "tails": self.tails,
            "faults": [{**fault.__dict__, "text": str(fault)} for fault in self.faults],
            "more_faults": self.more_faults,
            "unproven": self.unproven,
            "chains": [
                {"epoch": epoch, "partition": partition, "next_offset": offset, "chain": chain.hex()}
                for (epoch, partition), (offset, chain) in sorted(self.chains.items())
            ],
        }
