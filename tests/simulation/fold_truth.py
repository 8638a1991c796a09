"""What the log says, offset by offset: the oracle's own fold (it imports nothing of the product), with its history."""

from bisect import bisect_right
from collections import defaultdict
from typing import Any

from tests.oracle_book import ACCEPTED, Book, Delta, Total
from tests.oracle_book import Record as OracleRecord
from tests.oracle_fold import Partition
from tests.oracle_wire import lane
from tests.simulation.fold_kafka import Record


class _Used(dict[Total, int]):
    """Totals that remember behind which offset they had which value."""

    def __init__(self) -> None:
        self.next_offset = 0
        self.history: dict[Total, tuple[list[int], list[int]]] = {}

    def __missing__(self, key: Total) -> int:
        return 0

    def __setitem__(self, key: Total, value: int) -> None:
        super().__setitem__(key, value)
        places, values = self.history.setdefault(key, ([], []))
        if places and places[-1] == self.next_offset:
            values[-1] = value
        else:
            places.append(self.next_offset)
            values.append(value)

    def at(self, key: Total, next_offset: int) -> int:
        """Its value when the log was folded up to `next_offset`."""
        places, values = self.history[key]
        place = bisect_right(places, next_offset)
        return values[place - 1] if place else 0


class _Watched(Partition):
    """Notes where each delta is caused."""

    def __init__(self, number: int, width: int, book: Book) -> None:
        super().__init__(number, width, book)
        self.offset = 0
        self.caused: dict[str, int] = {}
        """identifier → offset of the record that let it go."""

    def _flush(self, flush: int) -> None:
        before = set(self.book.deltas)
        super()._flush(flush)
        self.caused |= dict.fromkeys([name for name in self.book.deltas if name not in before], self.offset)


class Truth:
    """The log of the world, folded by other code."""

    def __init__(self, width: int, numbers: list[int]) -> None:
        self.used = _Used()
        self.book = Book(used=self.used)  # type: ignore[arg-type]
        self.partitions = {number: _Watched(number, width, self.book) for number in numbers}
        self.accepted: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """tag of a call → where it was accepted."""
        self.records: dict[tuple[int, int], Record] = {}
        self.of_lane: dict[int, list[Total]] = defaultdict(list)
        self._log_ms: dict[int, list[int]] = {number: [0] for number in numbers}

    def feed(self, number: int, record: Record) -> None:
        """One record that the log has."""
        partition = self.partitions[number]
        partition.offset, self.used.next_offset = record.offset, record.offset + 1
        self.records[number, record.offset] = record
        self._log_ms[number].append(max(self._log_ms[number][-1], record.timestamp))
        known = len(self.used)
        rows = len(self.book.rows)
        partition.feed(OracleRecord(number, record.offset, record.timestamp, record.key, record.value, record.headers))
        for row in self.book.rows[rows:]:
            self.accepted[row.tag].append((number, record.offset))
        if len(self.used) != known:
            for total in list(self.used)[known:]:
                self.of_lane[lane(total[0])].append(total)

    def verdict(self, number: int, offset: int) -> tuple[str, str]:
        """(verdict, reason) of a record as the audit log words it."""
        reason = self.book.dead.get((number, offset), "")
        found = self.book.verdicts[number][offset]
        return (ACCEPTED if found == "tick" else found), reason

    def deltas_before(self, number: int, next_offset: int) -> dict[str, Delta]:
        """identifier → delta that records before an offset have let go."""
        return {
            name: self.book.deltas[name]
            for name, offset in self.partitions[number].caused.items()
            if offset < next_offset and self.book.deltas[name].units
        }

    def letters_before(self, number: int, next_offset: int) -> dict[int, str]:
        """offset → reason of what is refused before an offset."""
        return {
            offset: reason
            for (place, offset), reason in self.book.dead.items()
            if place == number and offset < next_offset
        }

    def log_time_ms(self, number: int, next_offset: int) -> int:
        """Log time behind an offset."""
        return self._log_ms[number][next_offset]

    def totals_of(self, number: int, next_offset: int) -> dict[Any, int]:
        """Every total of a partition as of an offset."""
        width = next(iter(self.partitions.values())).partitions
        found = {}
        for key_lane, totals in self.of_lane.items():
            if key_lane % width == number:
                for total in totals:
                    if value := self.used.at(total, next_offset):
                        found[total] = value
        return found
