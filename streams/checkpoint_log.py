"""The newest checkpoints, read from Kafka: the tail first, all there is only where it holds no valid one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tollway.connectors.errors import Refused
from tollway.connectors.kafka import CHECKPOINT_TAIL, read_checkpoints
from tollway.streams import checkpoint
from tollway.streams.checkpoint import Checkpoint


@dataclass
class Newest:
    """What was found for an epoch, and which other epochs' checkpoints stand beside it."""

    epoch: str
    found: dict[tuple[str, int], Checkpoint] = field(default_factory=dict)
    """(group, partition) → its newest valid checkpoint."""
    others: dict[tuple[str, int], set[str]] = field(default_factory=dict)

    def of(self, group: str, partition: int) -> Checkpoint:
        """Raises Refused where there is none: a worker never guesses that a log is new."""
        loaded = self.found.get((group, partition))
        if loaded is not None:
            return loaded
        others = self.others.get((group, partition), set())
        raise Refused(
            f"group {group} has no valid checkpoint for partition {partition} of log {self.epoch}"
            + (f", only of {', '.join(sorted(others))}: this is another log than the checkpoint's" if others else "")
            + ": both slots are damaged or lost; stop the workers and run `tollway rebuild checkpoints`, or for a new log "
            "`tollway topics create`"
        )


async def newest_checkpoints(
    bootstrap: str, security: dict[str, Any], epoch: str, groups: Mapping[str, bool], partitions: Iterable[int]
) -> Newest:
    """Newest valid checkpoints of some partitions. `groups`: name → whether its writes are fenced, and the turn counts."""
    newest = Newest(epoch)
    wanted = list(partitions)
    for tail in (CHECKPOINT_TAIL, None):
        missing = [number for number in wanted if any((group, number) not in newest.found for group in groups)]
        if not missing:
            break
        committed = any(groups.values())
        seen = await read_checkpoints(bootstrap, security, missing, tail, committed=committed)
        for number in missing:
            for group, fenced in groups.items():
                found = checkpoint.newest(seen[number], group, epoch, number, by_turn=fenced)
                if found is not None:
                    newest.found[group, number] = found
                else:
                    newest.others[group, number] = checkpoint.epochs(seen[number], group, number) - {epoch}
    return newest
