"""From which snapshot a partition is folded again, where the fold is compared, and what came of it. Pure."""

from dataclasses import dataclass, field
from typing import Any

from tollway.connectors.errors import Refused
from tollway.streams.seal import Seal

LOG = "log"


@dataclass
class Boundary:
    """A place where the refolded state was compared: `what` = "sealed <day>" or "checkpoint"; hashes in hex."""

    what: str
    offset: int
    hash: str
    rebuilt: str = ""

    @property
    def equal(self) -> bool:
        return self.hash == self.rebuilt


@dataclass
class Outcome:
    """One partition of one group. `wrote` says what was put in place, "" where nothing was."""

    group: str
    partition: int
    begin: str
    from_offset: int
    boundaries: list[Boundary] = field(default_factory=list)
    end_offset: int = 0
    wrote: str = ""

    @property
    def ok(self) -> bool:
        """Equal wherever it was compared with a snapshot or a checkpoint."""
        return all(boundary.equal for boundary in self.boundaries)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "group": self.group,
            "partition": self.partition,
            "from": self.begin,
            "from_offset": self.from_offset,
            "end_offset": self.end_offset,
            "boundaries": [{**boundary.__dict__, "equal": boundary.equal} for boundary in self.boundaries],
            "ok": self.ok,
            "wrote": self.wrote,
        }


def chosen(seals: list[Seal], target: int | None, start: str | None, partition: int) -> Seal | None:
    """The snapshot to fold from; None = the log's first record.

    `target` = where the fold ends, None = at the newest snapshot. Unless `start` names one (or the log), the last but one
    before the target: so that the fold meets one more, whose hash it must have. Raises Refused where there is none of the name.
    """
    fit = [seal for seal in seals if target is None or seal.next_offset <= target]
    if start == LOG:
        return None
    if start is not None:
        named = next((seal for seal in fit if str(seal.day) == start), None)
        if named is None:
            days = ", ".join(str(seal.day) for seal in fit) or "none"
            raise Refused(f"--from is {start}: partition {partition} has sealed snapshots {days}, and `{LOG}`")
        return named
    return fit[-2] if len(fit) > 1 else None


def mismatch(outcome: Outcome) -> str:
    """The sentence of a refusal."""
    bad = next(boundary for boundary in outcome.boundaries if not boundary.equal)
    return (
        f"group {outcome.group}, partition {outcome.partition}: folded from {outcome.begin} the state at {bad.what} "
        f"(offset {bad.offset}) has hash {bad.rebuilt}, not {bad.hash}: nothing was written for it; prove the log with "
        "`tollway audit verify`, then rebuild --from another snapshot"
    )
