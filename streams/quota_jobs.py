"""What a partition's lanes have to be told, as calls: built from one snapshot of the state, answered one by one.

A job is one lane's business of one turn. Nothing here connects: `quota_view` flies the calls and hands the replies back.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tollway.connectors.redis import APPLY, REWRITE_BEGIN, REWRITE_END, SWEEP, Answer, Swept
from tollway.schemas.lane import LANES, lane
from tollway.streams.policy import gate_fields
from tollway.streams.quota import Quota
from tollway.streams.quota_lane import WHOLE, LaneView, Phase, settlement
from tollway.streams.quota_lots import Lot, Part, parts
from tollway.streams.state import PartitionState

WHOLE_TOTALS_MAX = 50_000
"""Partitions with more totals are refreshed one lane a turn, so that the loop is never held for long."""
SWEEP_S = 60.0
SWEEP_LIMIT = 100
SWEEP_WEIGHT = 500

Figures = Counter[str]


class Job(Protocol):
    """`call` and its weight are due; `answered` takes the reply and says whether another call is due."""

    call: bytes
    weight: int

    def answered(self, reply: Any, now: float) -> bool: ...

    def abandoned(self) -> None:
        """Whether the call took effect is not known: the same is due again."""


@dataclass
class View:
    """One assigned partition: its state, the offset whose totals may show, and its lanes."""

    state: PartitionState
    lanes: dict[int, LaneView]
    off: int = 0
    log_ms: int = 0
    changes: int = -1
    """`quota.changes` at `off`: while it is the same, totals are still those of `off`."""
    owed: bool = False
    """A turn found totals beyond `off`: the next note builds its jobs."""
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    def of(cls, state: PartitionState, now: float) -> "View":
        """A partition just assigned: all lanes to be refreshed, sweeps spread over time."""
        numbers = range(state.partition, LANES, state.partitions)
        lanes = {number: LaneView(number, sweep_at=now + SWEEP_S * number / LANES) for number in numbers}
        view = cls(state, lanes)
        view.note(state)
        return view

    @property
    def quota(self) -> Quota:
        found: Quota = self.state.parts["quota"]
        return found

    def note(self, state: PartitionState) -> None:
        """Totals up to the state's offset may show."""
        self.state, self.off, self.log_ms = state, state.next_offset, state.log_time_ms
        self.changes = self.quota.changes

    def refresh(self) -> None:
        """All totals are due again."""
        self.jobs = []
        for found in self.lanes.values():
            if found.phase is Phase.LIVE:
                found.phase, found.expect = Phase.REFRESH, None

    def ask_again(self) -> None:
        """Redis was away and may be another by now: each lane is told something, and so asked, in the next turn."""
        for found in self.lanes.values():
            found.log_ms = -1

    @property
    def current(self) -> bool:
        """Whether the totals are those of the noted offset."""
        return self.changes == self.quota.changes


class Apply:
    """A batch of one lane: its totals, policies and closes as they stand at one offset."""

    def __init__(
        self, view: View, lane: LaneView, epoch: str, tok: str, figures: Figures, lot: Lot, accounts: list[str]
    ) -> None:
        self._quota, self._lane, self._figures = view.quota, lane, figures
        self._whole = lane.phase in WHOLE
        self._lot, self._accounts, self._closes = lot, accounts, self._quota.take_closes(lane.number)
        self._off, self._log_ms = view.off, view.log_ms
        expect = "" if lane.expect is None else lane.expect
        self._head, self._tail = (epoch, view.off, tok), (expect, view.log_ms)
        known = view.state.directory.accounts
        policies = [
            [name, *gate_fields(own.policy, own.policy_version, self._quota.scopes.full(name), own.frozen)]
            for name, own in ((name, known[name]) for name in accounts)
        ]
        self._parts: Iterator[Part] = parts(lot, policies, self._closes)
        self._number = -1
        self._after: Part | None = next(self._parts)
        self._advance()

    def _advance(self) -> None:
        part = self._after
        assert part is not None
        self._after = next(self._parts, None)
        self._number += 1
        self.weight = part.weight
        more = "1" if self._after is not None else ""
        self.call = APPLY.call(self._lane.number, *self._head, self._number, more, *self._tail, part.body)

    def answered(self, reply: Any, now: float) -> bool:
        answer = Answer.read(reply)
        if answer.word == "OK" and self._after is not None:
            self._advance()
            return True
        self._figures["calls"] += self._number + 1
        if self._lane.applied(answer, self._off, self._log_ms, now):
            self._figures["written"] += len(self._lot)
            if any(self._lot.ends):
                self._lot.acknowledged()
        else:
            self._figures[answer.word.lower()] += 1
            self.abandoned()
        return False

    def abandoned(self) -> None:
        if not self._whole:  # a whole lane stays due as a whole
            self._lot.give_back()
            self._quota.policies.update(self._accounts)
        self._quota.put_back_closes(self._lane.number, self._closes)


class Begin:
    """The start of a rewrite."""

    def __init__(self, view: View, lane: LaneView, epoch: str, figures: Figures) -> None:
        self._lane, self._figures = lane, figures
        self.call, self.weight = REWRITE_BEGIN.call(lane.number, epoch, view.off), 1

    def answered(self, reply: Any, now: float) -> bool:
        answer = Answer.read(reply)
        self._lane.rewrite_begun(answer, now)
        self._figures["rewrites" if answer.word == "OK" else answer.word.lower()] += 1
        return False

    def abandoned(self) -> None: ...


class End:
    """The end of a rewrite."""

    def __init__(self, lane: LaneView, epoch: str, figures: Figures) -> None:
        self._lane, self._figures = lane, figures
        assert lane.expect is not None
        self.call, self.weight = REWRITE_END.call(lane.number, epoch, lane.gen, lane.expect), 1

    def answered(self, reply: Any, now: float) -> bool:
        answer = Answer.read(reply)
        if not self._lane.rewrite_ended(answer):
            self._figures[answer.word.lower()] += 1
        return False

    def abandoned(self) -> None: ...


class Sweep:
    """What is due in a lane by log time: old fields, expired holds, and captured ones that ask for their usage."""

    def __init__(self, view: View, lane: LaneView, figures: Figures) -> None:
        self._view, self._lane, self._figures = view, lane, figures
        self.call, self.weight = SWEEP.call(lane.number, SWEEP_LIMIT), SWEEP_WEIGHT

    def answered(self, reply: Any, now: float) -> bool:
        swept = Swept.read(reply)
        self._lane.sweep_at = now if swept.more else now + SWEEP_S
        self._figures["swept_fields"] += swept.fields
        self._figures["unsettled"] += len(swept.unsettled)
        for hold, source, sequence in swept.asked:
            found = settlement(self._view.state.dedupe, self._lane.number, source, sequence, self._view.log_ms)
            self._figures["lost_usage"] += found == "lost"
            if found != "open":
                self._view.quota.put_back_closes(self._lane.number, [hold])
        return False

    def abandoned(self) -> None: ...


def due(view: View, epoch: str, token: Iterator[str], now: float, figures: Figures) -> list[Job]:
    """The jobs of a partition whose totals are those of its noted offset: one a lane at most."""
    free = [lane for lane in view.lanes.values() if not lane.waits(view.off, now)]
    jobs: list[Job] = [Begin(view, lane, epoch, figures) for lane in free if lane.phase in (Phase.BEGIN, Phase.HALTED)]
    ending = [lane for lane in free if lane.phase is Phase.GATES and now >= lane.end_at]
    jobs += [End(lane, epoch, figures) for lane in ending]
    sweeping = [lane for lane in free if lane.phase is Phase.LIVE and now >= lane.sweep_at]
    jobs += [Sweep(view, lane, figures) for lane in sweeping]
    busy = {lane.number for lane in (*ending, *sweeping)}
    whole = [lane for lane in free if lane.phase in WHOLE]
    jobs += _applies(view, whole[: None if len(view.quota) <= WHOLE_TOTALS_MAX else 1], epoch, token, figures)
    open_phases = (Phase.LIVE, Phase.GATES)
    jobs += _applies(
        view, [lane for lane in free if lane.phase in open_phases and lane.number not in busy], epoch, token, figures
    )
    return jobs


def _applies(view: View, lanes: list[LaneView], epoch: str, token: Iterator[str], figures: Figures) -> Iterator[Apply]:
    """Applies for lanes that are all whole or all not; those with nothing to say are left out."""
    if not lanes:
        return
    quota, whole = view.quota, lanes[0].phase in WHOLE
    numbers = [found.number for found in lanes]
    ends = [found.number for found in lanes if whole or found.expect is None]
    lots = quota.take(numbers, log_time_ms=view.log_ms, everything=whole, ends=ends)
    accounts = _accounts(view, set(numbers), whole)
    step_ms = view.state.step_s * 1000
    for found in lanes:
        lot, names = lots.get(found.number), accounts.get(found.number, [])
        late = view.log_ms // step_ms > found.log_ms // step_ms
        if whole or lot or names or late or found.number in quota.closes:
            yield Apply(view, found, epoch, next(token), figures, lot or Lot(), names)


def _accounts(view: View, numbers: Collection[int], whole: bool) -> dict[int, list[str]]:
    """lane → accounts whose `p` is due, from now on not due."""
    quota, found = view.quota, dict[int, list[str]]()
    for name in view.state.directory.accounts if whole else quota.policies:
        number = lane(name)
        if number in numbers:
            found.setdefault(number, []).append(name)
    for names in found.values():
        quota.policies.difference_update(names)
    return found
