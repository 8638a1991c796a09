"""accounts → Redis: how much of each quota is used, per account, scope, meter and window (design §5).

One Quota is the state of one partition. Counting is `streams.counting`, the buffers are `streams.totals`; the way to Redis
is `streams.quota_view`. The state is a function of the log alone: however it is cut into batches, `dump` gives the same bytes.
"""

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tollway.connectors.errors import Fatal
from tollway.schemas.lane import LANES, lane
from tollway.streams.batch import Batch
from tollway.streams.columns import Ints
from tollway.streams.counting import (
    Counted,
    Family,
    Sums,
    allowed,
    by_start,
    coarser,
    counted,
    families,
    hits,
    in_time,
    summed,
)
from tollway.streams.directory import Directory
from tollway.streams.policy import Plan, plan
from tollway.streams.quota_lots import ENDING_KINDS, Lot, taken
from tollway.streams.totals import METER_BITS, METER_MASK, METERS_MAX, OTHER, SCOPES_MAX, Scopes, Table
from tollway.streams.windows import FINEST_FIRST, IDLE_KEEP_S, KEEP_S, oldest_start_s, starts_s

FORMAT = 1
CLOSES_MAX = 100_000
"""Closes of a lane waiting for Redis; the oldest are dropped beyond that (sweep closes their holds later)."""
CLOSED = "~closed"
"""Total, under `<CLOSED> L:0`, of a run or session that is closed. No meter has such a name."""
GATE_KINDS = ("account.open", "account.freeze", "account.unfreeze", "policy.set")
"""Commands that change what `p:<account>` tells the gate."""
_IDLE_CHECK_S = 3_600

Found = tuple[tuple[str, ...], Family, Ints]
"""Windows, a family of scopes, the quantities it counts in these windows."""


class Quota:
    """Totals of one partition, and what Redis has not been told of them."""

    def __init__(self) -> None:
        self.step_time_s = 0
        self.meters: list[str] = []
        self.scopes = Scopes()
        self.tables: dict[tuple[str, int], Table] = {}
        self.alarms: Counter[str] = Counter()
        """late, ahead: quantities not counted; other_scope: scopes counted in `other~`; overflow: totals at their end;
        closes_dropped; close_in_full: runs and sessions closed without a mark, in a full account. Of this process, not of the log."""
        self.changes = 0
        """Grows with every call that may change a total: tells whether totals are still those of a noted offset."""
        self.policies: set[str] = set()
        """Accounts whose `p` must be written."""
        self.closes: dict[int, list[str]] = {}
        """lane → holds that usage has ended."""
        self._meter_ids: dict[str, int] = {}
        self._plans: dict[str, tuple[dict[str, Any], Plan]] = {}

    def on_step(self, step_time_s: int) -> None:
        """A new step begins: drop the windows that are no longer counted."""
        self.changes += 1
        hours = step_time_s // _IDLE_CHECK_S, self.step_time_s // _IDLE_CHECK_S
        self.step_time_s = step_time_s
        for name, table in list(self.tables.items()):
            if table.end is not None and table.end + KEEP_S[table.window] <= step_time_s:
                del self.tables[name]
                self._release(table.keys[: table.n])
        if hours[0] != hours[1] and ("L", 0) in self.tables:
            self._drop_idle(self.tables["L", 0])

    def on_command(self, directory: Directory, command: dict[str, Any]) -> None:
        """An accepted command: what the gate is told of an account, or a run or session that is closed."""
        self.changes += 1
        kind, account, body = command["kind"], command["account"], command["body"]
        if kind in GATE_KINDS and account in directory.accounts:
            self.policies.add(account)
        elif kind == "run.close":
            self._close_scopes([(account, f"run:{body['run']}")])
        elif kind == "session.close":
            self._close_scopes([(account, f"sess:{body['session']}")])

    def fold(self, directory: Directory, batch: Batch) -> None:
        """Count a batch. Raises nothing: what cannot be counted is in `alarms`."""
        self.changes += 1
        self._close_holds(batch)
        usage = counted(batch, directory.meters)
        if usage is None:
            return
        plans, plan_of_row = self._plans_of(directory, usage)
        found = self._found(usage, plans, plan_of_row)
        scope_ids = self._scope_ids(usage, found)
        for window, sums in self._sums(usage, found, scope_ids).items():
            for start, part in by_start(sums, oldest_start_s(window, self.step_time_s)):
                self._add(window, start, part)

    def _plans_of(self, directory: Directory, usage: Counted) -> tuple[list[Plan], Ints]:
        """(different plans, [r] plan of each row)."""
        numbers: dict[Plan, int] = {}
        of_account = []
        for name in usage.accounts:
            account = directory.accounts.get(name)
            if account is None:
                raise Fatal(f"accepted usage of account {name!r}, which the directory does not know")
            policy, known = account.policy, self._plans.get(name)
            if known is None or known[0] is not policy:
                known = self._plans[name] = (policy, plan(policy))
            of_account.append(numbers.setdefault(known[1], len(numbers)))
        return list(numbers), np.array(of_account, np.int64)[usage.account]

    def _found(self, usage: Counted, plans: list[Plan], plan_of_row: Ints) -> list[Found]:
        """Which quantities count, for whom, in which windows."""
        shapes = allowed(usage, plans)
        found: list[Found] = []
        for kinds, family in families(usage, plans):
            for windows, mask in shapes.items():
                items = hits(usage, plan_of_row, mask, kinds, family)
                if len(items):
                    items, late, ahead = in_time(usage, items, windows, self.step_time_s)
                    self.alarms["late"] += late
                    self.alarms["ahead"] += ahead
                if len(items):
                    found.append((windows, family, items))
        return found

    def _scope_ids(self, usage: Counted, found: list[Found]) -> dict[int, Ints]:
        """id(family) → [codes] scope numbers. New scopes are numbered in the order of the log, however it is cut."""
        ids: dict[int, Ints] = {}
        missing: list[tuple[int, int, int, int, str]] = []
        for order, (place, family) in enumerate({id(family): family for _, family, _ in found}.items()):
            rows = np.full(int(family.code.max()) + 1, len(family.code))
            for _, mine, items in found:
                if mine is family:
                    seen = usage.row[items]
                    np.minimum.at(rows, family.code[seen], seen)
            codes = np.flatnonzero(rows < len(family.code))
            rows = rows[codes]
            scopes, get = family.scopes(rows), self.scopes.ids.get
            accounts = [usage.accounts[account] for account in usage.account[rows].tolist()]
            numbers = [get(f"{account}~{scope}", -1) for account, scope in zip(accounts, scopes, strict=True)]
            ids[place] = np.full(int(family.code.max()) + 1, -1)
            ids[place][codes] = numbers
            if -1 in numbers:
                each = zip(rows.tolist(), codes.tolist(), scopes, numbers, strict=True)
                missing += [(row, order, place, code, scope) for row, code, scope, number in each if number < 0]
        missing.sort()
        named = [(usage.accounts[usage.account[row]], scope) for row, _, _, _, scope in missing]
        for (_, _, place, code, _), number in zip(missing, self._new_scopes(named), strict=True):
            ids[place][code] = number
        return ids

    def _new_scopes(self, named: list[tuple[str, str]]) -> list[int]:
        """Numbers for scopes that have no totals yet; `other~` where an account is full."""
        added = Counter(account for account, _ in named)
        live = self.scopes.live
        self.policies.update(account for account in added if account not in live)  # one opened on sight has no command
        if all(live.get(account, 0) + count < SCOPES_MAX for account, count in added.items()):
            return self.scopes.add(named)
        return [self._new_scope(account, scope) for account, scope in named]

    def _new_scope(self, account: str, scope: str) -> int:
        if self.scopes.full(account):
            self.alarms["other_scope"] += 1
            known = self.scopes.ids.get(f"{account}~{OTHER}")
            return self.scopes.add([(account, OTHER)])[0] if known is None else known
        number = self.scopes.add([(account, scope)])[0]
        if self.scopes.full(account):
            self.policies.add(account)
        return number

    def _meter_numbers(self, usage: Counted, found: list[Found]) -> Ints:
        """[meters of the batch] their numbers; new ones are numbered in the order of the log."""
        numbers = [self._meter_ids.get(name, -1) for name in usage.meters]
        if -1 in numbers:
            first = np.full(len(numbers), len(usage.meter))
            for _, _, items in found:
                np.minimum.at(first, usage.meter[items], items)
            for code in np.argsort(first).tolist():
                if numbers[code] < 0 and first[code] < len(usage.meter):
                    numbers[code] = self._meter(usage.meters[code])
        return np.array(numbers, np.int64)

    def _sums(self, usage: Counted, found: list[Found], scope_ids: dict[int, Ints]) -> dict[str, Sums]:
        """Window → sums of all families: grouped by the finest window of each shape, folded up from there."""
        meter_ids = self._meter_numbers(usage, found)
        pieces: dict[str, list[Sums]] = defaultdict(list)
        for windows in dict.fromkeys(windows for windows, _, _ in found):
            mine = [(family, items, usage.row[items]) for names, family, items in found if names == windows]
            scope = np.concatenate([scope_ids[id(family)][family.code[row]] for family, _, row in mine])
            items, row = np.concatenate([items for _, items, _ in mine]), np.concatenate([row for _, _, row in mine])
            key = (scope << METER_BITS) | meter_ids[usage.meter[items]]
            sums = summed(key, starts_s(windows[0], usage.at_s)[row], usage.units[items], row)
            pieces[windows[0]].append(sums)
            for window in windows[1:]:
                sums = coarser(sums, window)
                pieces[window].append(sums)
        return {window: joined(parts) for window, parts in pieces.items()}

    def _add(self, window: str, start: int, sums: Sums) -> None:
        table = self.tables.get((window, start))
        if table is None:
            table = self.tables[window, start] = Table(window, start)
        fresh, ended = table.add(sums.key, sums.units, sums.row, self.step_time_s)
        self.alarms["overflow"] += ended
        if len(fresh):
            self.scopes.refer(fresh >> METER_BITS)

    def _release(self, keys: Ints) -> None:
        self.policies.update(self.scopes.release(keys >> METER_BITS))

    def _drop_idle(self, life: Table) -> None:
        """Runs and sessions close 35 days after their last usage; that they are closed is forgotten 35 days later."""
        kinds = self.scopes.kinds[life.keys[: life.n] >> METER_BITS]
        idle = np.isin(kinds, ENDING_KINDS) & (life.last[: life.n] + IDLE_KEEP_S <= self.step_time_s)
        if not idle.any():
            return
        keys = life.keys[: life.n][idle]
        used = np.unique(keys[keys & METER_MASK != self._meter_ids.get(CLOSED, -1)] >> METER_BITS)
        names = [self.scopes.names[number] for number in used.tolist()]
        self._release(life.drop(idle))
        self._close_scopes([(name[: name.index("~")], name[name.index("~") + 1 :]) for name in names])

    def _close_scopes(self, named: list[tuple[str, str]]) -> None:
        """Mark runs and sessions as closed: a total of 1 that lives for 35 days, travels and is rewritten like any other."""
        numbers = [self._scope_number(account, scope) for account, scope in named]
        keys = (np.array([number for number in numbers if number >= 0], np.int64) << METER_BITS) | self._meter(CLOSED)
        life = self.tables.get(("L", 0))
        known = keys[:0] if life is None else keys[life.slots(keys) >= 0]
        keys = keys[~np.isin(keys, known)]
        if len(keys):
            self._add(
                "L", 0, Sums(keys, np.zeros(len(keys), np.int64), np.ones(len(keys), np.int64), np.arange(len(keys)))
            )

    def _scope_number(self, account: str, scope: str) -> int:
        """A scope's number, made where it has none; -1 in a full account, where unknown scopes share `other~`."""
        known = self.scopes.ids.get(f"{account}~{scope}")
        if known is not None:
            return known
        if self.scopes.full(account):
            self.alarms["close_in_full"] += 1
            return -1
        return self._new_scopes([(account, scope)])[0]

    def _meter(self, name: str) -> int:
        number = self._meter_ids.get(name)
        if number is None:
            if len(self.meters) == METERS_MAX:
                raise Fatal(f"one partition counts at most {METERS_MAX} meters: count fewer by policy")
            number = self._meter_ids[name] = len(self.meters)
            self.meters.append(name)
        return number

    def _close_holds(self, batch: Batch) -> None:
        """Accepted usage that names a hold ends it, whatever its status."""
        hold = batch.usage.column("hold")
        if hold.null_count == len(hold):
            return
        held = pa.array(batch.accepted & hold.is_valid().to_numpy(zero_copy_only=False))
        accounts = batch.usage.column("account").filter(held).to_pylist()
        ended: dict[int, list[str]] = defaultdict(list)
        for account, name in zip(accounts, hold.filter(held).to_pylist(), strict=True):
            ended[lane(account)].append(name)
        for number, holds in ended.items():
            self._set_closes(number, self.closes.get(number, []) + holds)

    def take(
        self, lanes: Collection[int], *, log_time_ms: int, everything: bool, ends: Collection[int]
    ) -> dict[int, Lot]:
        """Totals of these lanes that Redis has not been told (`everything`: all there are), as they stand; then clean."""
        return taken(self.tables.values(), self.scopes, self.meters, lanes, log_time_ms, everything, ends)

    def take_closes(self, number: int) -> list[str]:
        """Holds of a lane that usage has ended; then forgotten."""
        return self.closes.pop(number, [])

    def put_back_closes(self, number: int, holds: list[str]) -> None:
        """These still wait for Redis, before all others of the lane."""
        if holds:
            self._set_closes(number, holds + self.closes.get(number, []))

    def _set_closes(self, number: int, holds: list[str]) -> None:
        self.alarms["closes_dropped"] += max(0, len(holds) - CLOSES_MAX)
        self.closes[number] = holds[-CLOSES_MAX:]

    def dirty(self) -> npt.NDArray[np.int64]:
        """[256] totals of each lane that Redis has not been told."""
        counts = np.zeros(LANES, np.int64)
        for table in self.tables.values():
            for slots in table.touched:
                counts += np.bincount(self.scopes.lanes[table.keys[slots] >> METER_BITS], minlength=LANES)
        return counts

    def __len__(self) -> int:
        """Totals kept."""
        return sum(table.n for table in self.tables.values())

    def totals(self, account: str) -> dict[tuple[str, str, str, int], int]:
        """(scope, meter, window, start) → units of one account."""
        prefix = f"{account}~"
        mine = {number: name[len(prefix) :] for name, number in self.scopes.ids.items() if name.startswith(prefix)}
        return {
            (mine[key >> METER_BITS], self.meters[key & METER_MASK], table.window, table.start): units
            for table in self.tables.values()
            for key, units in zip(table.keys[: table.n].tolist(), table.totals[: table.n].tolist(), strict=True)
            if key >> METER_BITS in mine
        }

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it: equal bytes for equal logs. Its buffers are compressed already."""
        tables = sorted(self.tables.values(), key=lambda table: (FINEST_FIRST[table.window], table.start))
        return {
            "format": FORMAT,
            "step_time_s": self.step_time_s,
            "meters": self.meters,
            "scopes": self.scopes.dump(),
            "tables": [table.dump() for table in tables],
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Quota":
        """The inverse of `dump`. Redis is taken to know nothing. Raises Fatal where the format is another one."""
        if state["format"] != FORMAT:
            raise Fatal(f"quota state has format {state['format']}, this worker reads {FORMAT}: deploy the newer one")
        quota = cls()
        quota.step_time_s, quota.meters = state["step_time_s"], list(state["meters"])
        quota._meter_ids = {meter: number for number, meter in enumerate(quota.meters)}
        quota.scopes = Scopes.load(state["scopes"])
        for stored in state["tables"]:
            table = Table.load(stored)
            quota.tables[table.window, table.start] = table
            quota.scopes.refer(table.keys[: table.n] >> METER_BITS)
        return quota


def joined(parts: list[Sums]) -> Sums:
    """The sums of several shapes. Their keys differ, but for `other~`."""
    if len(parts) == 1:
        return parts[0]
    columns = [
        np.concatenate(column) for column in zip(*((s.key, s.start, s.units, s.row) for s in parts), strict=True)
    ]
    return summed(*columns)
