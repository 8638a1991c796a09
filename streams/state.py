"""Everything one partition knows: a function of its log up to `next_offset`, nothing else."""

from dataclasses import dataclass, field
from typing import Any

from tollway.streams.dedupe import Dedupe
from tollway.streams.directory import Directory
from tollway.streams.fold import NewerFold

FOLD_VERSION = 1
"""Newest way of folding that this build knows; older ones stay. Raised where the same log would fold to something else: what
is new counts where `directory.fold_version` says so, from a step that the command `fold.change` names."""


@dataclass
class PartitionState:
    """State of one partition in one group. `parts` holds what the group's parts keep, by name."""

    partition: int
    partitions: int
    epoch: str
    next_offset: int = 0
    log_time_ms: int = 0
    """Running maximum of append time: the only clock there is."""
    step: int = -1
    directory: Directory = field(default_factory=Directory)
    dedupe: Dedupe = field(default_factory=Dedupe)
    parts: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    """reason → records refused so far."""
    undeclared: dict[str, int] = field(default_factory=dict)
    """meter → accepted records in a meter that nobody declared."""

    @property
    def step_s(self) -> int:
        """Length of a step; 5 s until `log.open` says otherwise."""
        return self.directory.config.step_s if self.directory.config else 5

    @property
    def is_open(self) -> bool:
        """Whether this log's own `log.open` is folded: what stands before it counts nowhere."""
        config = self.directory.config
        return config is not None and config.epoch == self.epoch

    def step_of(self, log_time_ms: int) -> int:
        """Step of a log time."""
        return log_time_ms // (self.step_s * 1000)

    def enter(self, step: int) -> None:
        """A new step begins: forget what admission refuses by now. Raises NewerFold before anything of the step is folded."""
        self.step = step
        now_ms = step * self.step_s * 1000
        self.dedupe.forget(now_ms, self.step_s)
        self.directory.forget(now_ms)
        self.directory.change_fold(now_ms // 1000)
        refuse_newer(self.partition, self.directory)

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it; parts dump themselves."""
        return {
            "next_offset": self.next_offset,
            "log_time_ms": self.log_time_ms,
            "step": self.step,
            "directory": self.directory.dump(),
            "dedupe": self.dedupe.dump(),
            "refused": self.refused,
            "undeclared": self.undeclared,
            "parts": {name: part.dump() for name, part in self.parts.items()},
        }

    @classmethod
    def load(
        cls, partition: int, partitions: int, epoch: str, state: dict[str, Any], parts: dict[str, Any]
    ) -> "PartitionState":
        """The inverse of `dump`; `parts` maps a name to the class whose `load` takes that part's dump. Raises NewerFold."""
        directory = Directory.load(state["directory"])
        refuse_newer(partition, directory)  # before parts whose dumps may be in a newer form
        return cls(
            partition=partition,
            partitions=partitions,
            epoch=epoch,
            next_offset=state["next_offset"],
            log_time_ms=state["log_time_ms"],
            step=state["step"],
            directory=directory,
            dedupe=Dedupe.load(state["dedupe"]),
            refused=state["refused"],
            undeclared=state["undeclared"],
            parts={name: kind.load(state["parts"][name]) for name, kind in parts.items()},
        )


def refuse_newer(partition: int, directory: Directory) -> None:
    """Raises NewerFold where this build would fold on in another way than it must."""
    if directory.fold_version > FOLD_VERSION:
        raise NewerFold(
            f"partition {partition} is folded by version {directory.fold_version}, this worker knows up to {FOLD_VERSION}: "
            "deploy the newer one; nothing was folded wrongly"
        )
