"""Billing: accepted usage → sums per account, customer, meter, price and usage window → deltas to invoice (design §5)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tollway.schemas.command import LogConfig
from tollway.schemas.meter_event import UNITS_MAX, MeterEvent
from tollway.schemas.usage import BILLED_STATUS, LATE_S
from tollway.streams.batch import Batch
from tollway.streams.columns import Ints, Quantities, encoded, factorized
from tollway.streams.directory import Directory

WAIT_S = LATE_S
"""How long units wait for a customer after their window's end; then no invoice can take them, and they are `expired`."""

Key = tuple[str, str, str, str, int]
"""account, customer when folded ('' = none yet), meter, price_ref ('' = none), usage window start (s)."""


@dataclass(slots=True)
class Sum:
    """Units of one key, and the largest occurred_at (µs) among them."""

    units: int = 0
    last_us: int = 0

    def add(self, units: int, last_us: int) -> None:
        self.units += units
        self.last_us = max(self.last_us, last_us)


def sums(batch: Batch, meters: set[str], window_s: int) -> Iterator[tuple[str, str, str, int, int, int]]:
    """(account, meter, price_ref or '', window start s, units, last occurred µs) of what a batch adds to the invoice.

    Counted: accepted, status ok, rail null, meters of `meters`, units above zero.
    """
    billed = _billed(batch)
    if not billed.any():
        return
    whole = bool(billed.all())
    found = batch.quantities if whole else Quantities.of(batch.usage.column("quantities").filter(pa.array(billed)))
    occurred_us = batch.occurred_us if whole else batch.occurred_us[billed]
    accounts, account_of = batch.accounts
    prices, price_of = _prices(batch.usage.column("price_ref"))
    if not whole:
        accounts, prices = accounts[billed], prices[billed]
    names = [name for name in found.meters if name in meters]
    place = {name: number for number, name in enumerate(names)}
    meter = np.array([place.get(name, -1) for name in found.meters], np.int64)[found.meter]
    take = np.flatnonzero((meter >= 0) & (found.units > 0))  # a zero must not move last_occurred_at: cuts would show
    if not len(take):
        return
    windows, starts_s = _windows(occurred_us, window_s)
    # One number a key, below 2^61: a batch has at most 2^15 accounts, prices and windows, the directory some meters.
    series = (accounts * len(price_of) + prices) * len(starts_s) + windows
    row = found.row[take]
    groups, keys = factorized(series[row] * len(names) + meter[take])
    units, last_us = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    np.add.at(units, groups, found.units[take])  # exact: sums of a batch stay inside int64 (batch.RECORDS_MAX)
    np.maximum.at(last_us, groups, occurred_us[row])
    keys, of_meter = np.divmod(keys, len(names))
    keys, of_window = np.divmod(keys, len(starts_s))
    of_account, of_price = np.divmod(keys, len(price_of))
    columns = (column.tolist() for column in (of_account, of_meter, of_price, starts_s[of_window], units, last_us))
    for account, name, price, start_s, total, last in zip(*columns, strict=True):
        yield account_of[account], names[name], price_of[price], start_s, total, last


def _billed(batch: Batch) -> npt.NDArray[np.bool_]:
    """[m] accepted, status ok, rail null."""
    rail = batch.usage.column("rail")
    billed: npt.NDArray[np.bool_] = pc.equal(batch.usage.column("status"), BILLED_STATUS).to_numpy(zero_copy_only=False)
    billed = billed & batch.accepted
    return billed if rail.null_count == len(rail) else billed & rail.is_null().to_numpy(zero_copy_only=False)


def _prices(column: pa.Array) -> tuple[Ints, list[str]]:
    """([m] index of each row's price, price_refs; '' = none)."""
    if column.null_count == len(column):
        return np.zeros(len(column), np.int64), [""]
    codes, names = encoded(column)
    return codes + 1, ["", *names]


def _windows(occurred_us: Ints, window_s: int) -> tuple[Ints, Ints]:
    """([m] index of each row's usage window, their starts in s)."""
    window_us = window_s * 1_000_000
    first, last = int(occurred_us.min()) // window_us, int(occurred_us.max()) // window_us
    if first == last:
        return np.zeros(len(occurred_us), np.int64), np.array([first * window_s], np.int64)
    codes, different = factorized(occurred_us // window_us)
    return codes, different * window_s


class Billing:
    """What one partition has yet to invoice. A function of the log: batch cuts and restarts leave no trace."""

    def __init__(self) -> None:
        self._sums: dict[Key, Sum] = {}
        self._last_n: dict[str, int] = {}
        self._last_flush: int | None = None
        self.expired: dict[str, dict[str, int]] = {}
        """account → meter → units that no customer was bound for within WAIT_S: never invoiced."""

    def fold(self, directory: Directory, batch: Batch) -> None:
        """Add a batch's billable units."""
        config = directory.config
        if config is None or not batch.usage.num_rows:
            return
        meters = {meter for meter, event_name in directory.meters.items() if event_name is not None}
        if not meters:
            return
        customers: dict[str, str] = {}
        for account, meter, price_ref, start_s, units, last_us in sums(batch, meters, config.billing_window_s):
            customer = customers.get(account)
            if customer is None:
                known = directory.accounts.get(account)
                customer = customers[account] = (known.customer if known else None) or ""
            key = (account, customer, meter, price_ref, start_s)
            found = self._sums.get(key)
            if found is None:
                self._sums[key] = Sum(units, last_us)
            else:
                found.add(units, last_us)

    def on_step(self, directory: Directory, step_time_s: int) -> list[MeterEvent]:
        """Flush before the first record of a step: the deltas of all windows that ended, in order, n gapless an account.

        Flush k happens once, at the first step at or past k · window + grace; where several were crossed, only the last.
        """
        config = directory.config
        if config is None:
            return []
        flush = (step_time_s - config.billing_grace_s) // config.billing_window_s
        if self._last_flush is not None and flush <= self._last_flush:
            return []
        self._last_flush = flush
        due = self._take_ended(directory, flush * config.billing_window_s, config.billing_window_s)
        return [event for key in sorted(due) for event in self._delta(directory, config, flush, key, due[key])]

    def _take_ended(self, directory: Directory, until_s: int, window_s: int) -> dict[Key, Sum]:
        """Remove what ended by `until_s` and can be billed, under the customer who pays it."""
        due: dict[Key, Sum] = {}
        for key in [key for key in self._sums if key[4] + window_s <= until_s]:
            account, customer, meter, price_ref, start_s = key
            known = directory.accounts.get(account)
            customer = customer or (known.customer if known else None) or ""
            if customer and directory.meters.get(meter) is not None:
                found = self._sums.pop(key)
                # Units from before and after the bind are one delta: two would have one identity.
                due.setdefault((account, customer, meter, price_ref, start_s), Sum()).add(found.units, found.last_us)
            elif start_s + window_s + WAIT_S <= until_s:
                lost = self.expired.setdefault(account, {})
                lost[meter] = lost.get(meter, 0) + self._sums.pop(key).units
        return due

    def _delta(self, directory: Directory, config: LogConfig, flush: int, key: Key, found: Sum) -> Iterator[MeterEvent]:
        account, customer, meter, price_ref, start_s = key
        event_name = directory.meters[meter]
        assert event_name is not None, "only meters with an event name are taken"
        for part, before in enumerate(range(0, found.units, UNITS_MAX)):
            self._last_n[account] = n = self._last_n.get(account, 0) + 1
            yield {
                "epoch": config.origin or config.epoch,
                "account": account,
                "n": n,
                "deployment": config.deployment,
                "customer": customer,
                "meter": meter,
                "event_name": event_name,
                "price_ref": price_ref or None,
                "window_start_s": start_s,
                "flush": flush,
                "part": part,
                "units": min(UNITS_MAX, found.units - before),
                "last_occurred_at": found.last_us,
            }

    def of(self, keep: Callable[[str], bool]) -> "Billing":
        """What it holds for some accounts; flushes, and each account's n, go on where this stands."""
        found = Billing()
        found._last_flush = self._last_flush
        found._sums = {key: item for key, item in self._sums.items() if keep(key[0])}
        found._last_n = {account: n for account, n in self._last_n.items() if keep(account)}
        found.expired = {account: lost for account, lost in self.expired.items() if keep(account)}
        return found

    def unbound(self) -> dict[str, dict[str, int]]:
        """account → meter → units that wait for a customer, or for the first flush after the bind."""
        waiting: dict[str, dict[str, int]] = {}
        for (account, customer, meter, _, _), found in self._sums.items():
            if not customer:
                units = waiting.setdefault(account, {})
                units[meter] = units.get(meter, 0) + found.units
        return waiting

    def last_n(self) -> dict[str, int]:
        """account → n of its newest meter event."""
        return dict(self._last_n)

    def dump(self) -> dict[str, Any]:
        """The state, as msgpack takes it, in one order whatever the history: columns of the sums, sorted by key."""
        keys = sorted(self._sums)
        series = sorted({key[:4] for key in keys})
        number = {name: at for at, name in enumerate(series)}
        found = [self._sums[key] for key in keys]
        return {
            "flush": self._last_flush,
            "n": dict(sorted(self._last_n.items())),
            "expired": [
                [account, meter, str(units)]
                for account, lost in sorted(self.expired.items())
                for meter, units in sorted(lost.items())
            ],
            "series": [list(name) for name in series],
            "of": np.array([number[key[:4]] for key in keys], np.int32).tobytes(),
            "start_s": np.array([key[4] for key in keys], np.int64).tobytes(),
            "units": " ".join(str(item.units) for item in found),  # text: a sum of many batches may leave int64
            "last_us": np.array([item.last_us for item in found], np.int64).tobytes(),
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Billing":
        """The inverse of `dump`."""
        billing = cls()
        billing._last_flush, billing._last_n = state["flush"], dict(state["n"])
        for account, meter, units in state["expired"]:
            billing.expired.setdefault(account, {})[meter] = int(units)
        columns = (
            np.frombuffer(state["of"], np.int32).tolist(),
            np.frombuffer(state["start_s"], np.int64).tolist(),
            state["units"].split(),
            np.frombuffer(state["last_us"], np.int64).tolist(),
        )
        for at, start_s, units, last_us in zip(*columns, strict=True):
            account, customer, meter, price_ref = state["series"][at]
            billing._sums[account, customer, meter, price_ref, start_s] = Sum(int(units), last_us)
        return billing
