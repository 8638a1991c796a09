"""What must hold of the folds' effects, by name: judged when they arrive, after every step, and at rest."""

import struct
from collections import Counter, defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgpack

from tests.oracle_book import window_end
from tests.simulation.fold_kafka import Record
from tests.simulation.gate_model import Lane
from tollway.schemas import codec
from tollway.schemas.ids import born_ms
from tollway.schemas.meter_event import identifier
from tollway.schemas.topics import CHECKPOINTS, DEAD_LETTERS, METER_EVENTS, USAGE
from tollway.schemas.usage import SOURCE_LIFE_S
from tollway.streams import checkpoint
from tollway.streams.accounts import PARTS
from tollway.streams.dead_letters import parse_letter
from tollway.streams.seal import is_sealed, seals
from tollway.streams.state import PartitionState
from tollway.streams.stripe_outbox import Outbox
from tollway.streams.windows import KEEP_S

if TYPE_CHECKING:
    from tests.simulation.fold_world import World

DAY_S = 86_400


class Violation(AssertionError):
    """`name` is the invariant's."""

    def __init__(self, name: str, about: Any) -> None:
        super().__init__(f"{name}: {about}")
        self.name = name


def expect(holds: Any, name: str, about: Any) -> None:
    if not holds:
        raise Violation(name, about)


class Judge:
    """Keeps what it needs of each effect. A violation is kept too: whoever caused it must not catch it."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.found: Violation | None = None
        self.events: dict[int, dict[str, Any]] = defaultdict(dict)
        """partition → identifier → meter event"""
        self.by_n: dict[tuple[str, int], Any] = {}
        self.last_n: Counter[str] = Counter()
        self.letters: dict[int, dict[int, str]] = defaultdict(dict)
        self.audited: dict[str, dict[tuple[int, int], Any]] = defaultdict(dict)
        self.blocks: dict[int, dict[int, tuple[int, bytes, bytes]]] = defaultdict(dict)
        """partition → first offset → (last, block hash, chain)"""
        self.on_record: set[str] = set()
        self.newest: dict[tuple[str, int], Any] = {}
        self.seals: dict[str, Any] = {}
        self.billed: Counter[str] = Counter()
        self._judged = 0

    def guarded(self, check: Any, *arguments: Any) -> None:
        if self.found is None:
            try:
                check(*arguments)
            except Violation as violation:
                self.found = violation

    # Kafka

    def heard(self, topic: str, number: int, record: Record) -> None:
        """A record was appended, or its transaction committed."""
        if self.world.ended_at:
            self.guarded(self._of_another_log, topic, number, record)
            return
        if topic == USAGE.name:
            self.world.truth.feed(number, record)
        elif topic == METER_EVENTS.name:
            self.guarded(self._meter_event, number, record)
        elif topic == DEAD_LETTERS.name:
            self.guarded(self._dead_letter, number, record)
        elif topic == CHECKPOINTS.name:
            self.guarded(self._seal if is_sealed(record.key) else self._checkpoint, number, record)

    def _of_another_log(self, topic: str, number: int, record: Record) -> None:
        """Nothing is made of a log that was trimmed too far or made anew; what stood before may still be checkpointed."""
        key = (record.key or b"").decode()
        if topic == CHECKPOINTS.name and not is_sealed(record.key) and not key.startswith("stripe"):
            state = [(record.key or b"", record.value or b"")]
            found = checkpoint.newest(state, key.partition("|")[0], self.world.epoch, number)
            end = self.world.ended_at[number]
            expect(
                found and found.next_offset <= end, "another_log_is_not_folded", (key, found and found.next_offset, end)
            )
        else:
            expect(topic in (USAGE.name, CHECKPOINTS.name), "another_log_is_not_folded", (topic, number, key))

    def _meter_event(self, number: int, record: Record) -> None:
        event: Any = codec.decode(record.value or b"")[1]
        name, truth = identifier(event), self.world.truth.book.deltas
        due = truth.get(name)
        found = (event["account"], event["customer"], event["event_name"], event["units"], event["last_occurred_at"])
        wanted = (due.account, due.customer, due.event_name, due.units, due.last_us) if due else None
        expect(found == wanted, "meter_events_are_the_logs", (found, wanted))
        account, n = event["account"], event["n"]
        expect(self.by_n.setdefault((account, n), name) == name, "one_n_one_meter_event", (account, n))
        expect(n <= self.last_n[account] + 1, "n_is_gapless", (account, n, self.last_n[account]))
        self.last_n[account] = max(n, self.last_n[account])
        self.events[number][name] = event

    def _dead_letter(self, number: int, record: Record) -> None:
        letter = parse_letter(record.key or b"", record.value or b"", list(record.headers))
        offset, reason = letter["offset"], self.world.truth.book.dead.get((number, letter["offset"]))
        expect(letter["reason"] == reason, "dead_letters_exactly_poison", (number, offset, letter["reason"], reason))
        original = self.world.truth.records[number, offset].value or b""
        expect(original == (record.value or b""), "dead_letters_exactly_poison", (number, offset, "other bytes"))
        self.letters[number][offset] = letter["reason"]

    def _seal(self, number: int, record: Record) -> None:
        for seal in seals([(record.key, record.value)], self.world.epoch):
            known = self.seals.setdefault(seal.key, seal)
            same = (known.hash, known.next_offset, known.log_time_ms) == (seal.hash, seal.next_offset, seal.log_time_ms)
            expect(same, "sealed_once", (seal.key, known.next_offset, seal.next_offset))

    def _checkpoint(self, number: int, record: Record) -> None:
        group = (record.key or b"").decode().partition("|")[0]
        found = checkpoint.newest([(record.key or b"", record.value or b"")], group, self.world.epoch, number)
        if found is None:
            return
        place = group, number
        best = self.newest.get(place)
        by = (lambda c: c.turn) if group == "stripe" else (lambda c: c.next_offset)
        if best is None or by(found) >= by(best):
            self.newest[place] = found
        if group == "accounts":
            self._behind_effects(number, found.next_offset)
            self._counted(number, found)
        elif group == "audit":
            self._audited_up_to(number, found.next_offset)
        else:
            self._attempts(found)

    def _behind_effects(self, number: int, next_offset: int) -> None:
        """All that a checkpoint's records have caused is acknowledged."""
        truth = self.world.truth
        due = truth.deltas_before(number, next_offset).keys() - self.events[number].keys()
        expect(not due, "checkpoint_never_ahead_of_effects", ("meter events", number, next_offset, sorted(due)))
        letters = truth.letters_before(number, next_offset).keys() - self.letters[number].keys()
        expect(not letters, "checkpoint_never_ahead_of_effects", ("dead letters", number, next_offset, sorted(letters)))

    def _counted(self, number: int, found: Any) -> None:
        """The state's totals are those of the log up to its offset."""
        world = self.world
        state = PartitionState.load(number, world.width, world.epoch, found.state, PARTS)
        wanted = world.truth.totals_of(number, found.next_offset)
        quota, totals = state.parts["quota"], {}
        for account in state.directory.accounts:
            totals |= {(account, *key): units for key, units in quota.totals(account).items() if units}
        for key in wanted.keys() | totals.keys():
            end = window_end(key[3], key[4]) if len(key) == 5 else None
            kept = end is None or end + KEEP_S[key[3]] > quota.step_time_s
            if kept or key in totals:
                about = (number, found.next_offset, key, totals.get(key, 0), wanted.get(key, 0))
                expect(totals.get(key, 0) == wanted.get(key, 0), "counted_once", about)

    def _attempts(self, found: Any) -> None:
        for item in Outbox.load(found.state["sender"]).status()["pending"]:
            if item["attempts"]:
                self.on_record.add(item["identifier"])

    # ClickHouse

    def inserted(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Rows were stored."""
        self.guarded(self._inserted, table, rows)

    def _inserted(self, table: str, rows: list[dict[str, Any]]) -> None:
        truth = self.world.truth
        for row in rows:
            number = row["kafka_partition"]
            if table == "audit_manifest":
                self._block(number, row)
                continue
            at = number, row["kafka_offset"]
            expect(at in truth.records, "audit_is_the_log", (table, at, "no such record"))
            if table == "usage_log":
                record = truth.records[at]
                same = (row["raw"], row["record_key"]) == (record.value, record.key)
                expect(same, "audit_is_the_log", (table, at))
            else:
                verdict = row["verdict"], row["reason"]
                expect(verdict == truth.verdict(*at), "verdicts_agree", (at, verdict, truth.verdict(*at)))
            row = {name: value for name, value in row.items() if name != "append_time"}
            expect(self.audited[table].setdefault(at, row) == row, "a_row_is_one_row", (table, at))

    def _block(self, number: int, row: dict[str, Any]) -> None:
        first, last = row["first_offset"], row["last_offset"]
        blocks = self.blocks[number]
        mine = last, row["block_hash"], row["chain_hash"]
        expect(
            blocks.setdefault(first, mine) == mine, "blocks_are_cut_by_the_log", (number, first, last, blocks[first][0])
        )
        inside = [at for at in blocks if first < at <= last or (at < first <= blocks[at][0])]
        expect(not inside, "blocks_are_cut_by_the_log", (number, first, last, inside))
        records = [self.world.truth.records[number, at] for at in range(first, last + 1)]
        expect(row["block_hash"] == _block_hash(records), "the_chain_is_the_logs", (number, first))
        for table in ("usage_log", "usage_events"):
            lacking = [at for at in range(first, last + 1) if (number, at) not in self.audited[table]]
            expect(not lacking, "no_gap_in_audit", (table, number, lacking))

    def _audited_up_to(self, number: int, next_offset: int) -> None:
        """Whole blocks one behind the other, from the first record to a checkpoint's offset; and their chain."""
        blocks, at, chain = self.blocks[number], 0, bytes(32)
        while at < next_offset:
            expect(at in blocks, "no_gap_in_audit", ("manifest", number, at, next_offset))
            last, block, found = blocks[at]
            chain = sha256(chain + block).digest()
            expect(chain == found, "the_chain_is_the_logs", (number, at))
            at = last + 1
        expect(at == next_offset, "checkpoint_never_ahead_of_effects", ("audit", number, at, next_offset))

    # Stripe

    def called(self, name: str) -> None:
        """A call has arrived at Stripe."""
        self.guarded(expect, name in self.on_record, "attempt_is_on_record_before_the_call", name)

    def _billed(self) -> None:
        events = self.world.stripe.state.events
        deltas = self.world.truth.book.deltas
        for event in events[self._judged :]:
            name, due = event["identifier"], deltas.get(event["identifier"])
            self.billed[name] += int(event["value"])
            wanted = due.units if due else 0
            expect(self.billed[name] == wanted, "billed_once", (name, self.billed[name], wanted))
        self._judged = len(events)

    # Redis

    def told(self, number: int, script: str, arguments: tuple[Any, ...], reply: Any) -> None:
        """A script has run on a lane."""
        self.guarded(self._told, number, script, arguments, reply)

    def _told(self, number: int, script: str, arguments: tuple[Any, ...], reply: Any) -> None:
        if script == "apply" and reply[0] == b"OK":
            end = self.world.ended_at.get(number % self.world.width, arguments[1])
            expect(arguments[1] <= end, "another_log_is_not_folded", ("apply", number, arguments[1], end))
            for hold in arguments[-1]:
                self._closed(number, hold)
        if (script == "apply" and reply[0] == b"OK" and not arguments[4]) or (script == "end" and reply[0] == b"OK"):
            self._lane(number)

    def _closed(self, number: int, name: str) -> None:
        """A hold ends with or after the totals that its usage made."""
        hold = self.world.holds.get(name)
        if hold is None:
            return
        lane, truth = self.world.redis.lane(number), self.world.truth
        accepted = truth.accepted.get(hold.tag)
        if not accepted:
            place = number % self.world.width
            now_ms = truth.log_time_ms(place, len(truth.book.verdicts[place]))
            expired = born_ms(hold.source) + SOURCE_LIFE_S * 1000 < now_ms
            expect(expired, "hold_stays_until_counted", (name, "its usage is not in the log, and may come"))
            return
        for scope, base, _ in hold.fields:
            account, _, kind = scope.partition("~")
            meter, _, window = base.partition(" ")
            total = (account, kind, meter, window.partition(":")[0], int(window.partition(":")[2]))
            if total not in truth.used.history or _gone(lane, total):
                continue
            due = truth.used.at(total, accepted[0][1] + 1)
            shown = lane.used(scope, base) or 0
            expect(shown >= due, "hold_stays_until_counted", (name, scope, base, shown, due))

    def _lane(self, number: int) -> None:
        """A READY lane shows what the log says up to the offset that it names."""
        lane, truth = self.world.redis.lane(number), self.world.truth
        if lane.m is None or lane.m.state != "READY":
            return
        place = number % self.world.width
        log_ms = truth.log_time_ms(place, min(lane.m.begun, len(truth.book.verdicts[place])))
        expect(lane.m.log <= log_ms, "heartbeat_is_log_time", (number, lane.m.log, log_ms))
        for total in truth.of_lane[number]:
            account, scope, meter, window, start = total
            shown = lane.used(f"{account}~{scope}", f"{meter} {window}:{start}")
            least, most = truth.used.at(total, lane.m.off), truth.used.at(total, lane.m.begun)
            if shown is None:
                due = least and not _gone(lane, total) and not _dropped(log_ms, total)
                expect(not due, "redis_equals_fold_when_ready", (number, lane.m.off, total, None, least))
            elif not _gone(lane, total):
                about = (number, lane.m.off, total, shown, least, most)
                expect(least <= shown <= most or _dropped(log_ms, total), "redis_equals_fold_when_ready", about)
        for name, fields in lane.s.items():
            account, _, scope = name.partition("~")
            for base, (used, _) in fields.items():
                meter, _, window = base.partition(" ")
                kind, _, start = window.partition(":")
                known = (account, scope, meter, kind, int(start)) in truth.used.history
                expect(not used or known, "redis_equals_fold_when_ready", (number, name, base, used, "nobody used it"))

    # After every step

    def step(self) -> None:
        """What can be seen from outside at any time."""
        if not self.world.ended_at:
            self.guarded(self._billed)
            for number in self.world.redis.lanes:
                self.guarded(self._lane, number)
        if self.found is not None:
            raise self.found


def _gone(lane: Lane, total: Any) -> bool:
    """Whether Redis shows this window no longer, by its own log time."""
    end = window_end(total[3], total[4])
    return end is not None and lane.m is not None and (end + DAY_S) * 1000 <= lane.m.log


def _dropped(log_ms: int, total: Any) -> bool:
    """Whether the fold counts this window no longer, so that a rewrite leaves it out."""
    end = window_end(total[3], total[4])
    return end is not None and (end + KEEP_S[total[3]]) * 1000 <= log_ms


def _block_hash(records: list[Record]) -> bytes:
    """By the words of `streams.audit`, in other code."""
    hashes = b""
    for record in records:
        headers = msgpack.packb(record.headers) if record.headers else b""
        sizes = (-1 if text is None else len(text) for text in (record.key, headers, record.value))
        head = struct.pack("<qqiii", record.offset, record.timestamp, *sizes)
        hashes += sha256(head + (record.key or b"") + headers + (record.value or b"")).digest()
    return sha256(hashes).digest()
