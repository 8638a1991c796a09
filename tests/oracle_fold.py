"""What the log says: one record at a time, one partition at a time, in dictionaries. Design §2 to §5, read again from the text."""

import json
from copy import deepcopy
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.oracle_book import (
    ACCEPTED,
    BILLED,
    DAY,
    DUPLICATE,
    GROWN,
    HOLES_MAX,
    HOUR,
    KEEP_S,
    REFUSED,
    TICK,
    UNITS_MAX,
    Account,
    Book,
    Delta,
    Record,
    Row,
    Total,
    scopes_of,
    stripe_identifier,
    window_end,
    window_start,
)
from tests.oracle_wire import COMMAND_ID, ID, METER, Refused, check_content, lane, unframe


class Sequences:
    """What one (source, lane) has shown: everything up to `high` but the holes; nothing at or under `floor` is taken."""

    def __init__(self) -> None:
        self.high = 0
        self.floor = 0
        self.holes: dict[int, int] = {}

    def take(self, sequence: int) -> str:
        """ACCEPTED, DUPLICATE, or Refused("hole_closed")."""
        if sequence <= self.floor:
            raise Refused("hole_closed")
        if sequence > self.high:
            if sequence > self.high + 1:
                self.holes[self.high + 1] = sequence - 1
                if len(self.holes) > HOLES_MAX:
                    self.floor = self.holes.pop(min(self.holes))
            self.high = sequence
            return ACCEPTED
        for first, last in self.holes.items():
            if first <= sequence <= last:
                del self.holes[first]
                if first < sequence:
                    self.holes[first] = sequence - 1
                if sequence < last:
                    self.holes[sequence + 1] = last
                return ACCEPTED
        return DUPLICATE


class Partition:
    """One partition's fold. `feed` takes its records in offset order and writes into the book."""

    def __init__(self, partition: int, partitions: int, book: Book) -> None:
        self.number, self.partitions, self.book = partition, partitions, book
        self.log_time_ms = 0
        self.config: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.meters: dict[str, str | None] = {}
        self.prices: dict[str, dict[str, Any]] = {}
        self.accounts: dict[str, Account] = {}
        self.commands: set[str] = set()
        self.sequences: dict[tuple[str, int], Sequences] = {}
        self.event_ids: set[str] = set()
        self.open: dict[tuple[str, str, str, str, int], list[int]] = {}
        """account, customer or "", meter, price_ref or "", window start → [units, largest occurred]."""
        self.last_flush = -1
        self.step_s = 0
        self.version = 1
        self.changes: dict[int, int] = {}
        """fold version → time from whose step on it counts."""

    def child(self, number: int, partitions: int) -> "Partition":
        """What one partition of the next log begins with: the accounts whose lanes go there, and what concerns all of them."""
        found = Partition(number, partitions, self.book)

        def mine(account: str) -> bool:
            return lane(account) % partitions == number % GROWN

        for name in ("log_time_ms", "last_flush", "step_s", "version"):
            setattr(found, name, getattr(self, name))
        for name in ("keys", "meters", "prices", "commands", "event_ids", "changes"):
            setattr(found, name, getattr(self, name).copy())
        found.accounts = {name: deepcopy(account) for name, account in self.accounts.items() if mine(name)}
        found.open = {key: list(sums) for key, sums in self.open.items() if mine(key[0])}
        found.sequences = {
            pair: deepcopy(seen) for pair, seen in self.sequences.items() if pair[1] % partitions == number % GROWN
        }
        return found

    def feed(self, record: Record) -> None:
        self.log_time_ms = self.book.log_time_ms[self.number] = max(self.log_time_ms, record.append_ms)
        self._step()
        self.book.records += 1
        verdicts = self.book.verdicts[self.number]
        if record.offset != len(verdicts):
            raise AssertionError(f"{self.number}/{record.offset} follows {len(verdicts) - 1}")
        verdicts.append(self._verdict(record))

    def _verdict(self, record: Record) -> str:
        if record.key == b"tick" and record.value is None:
            return TICK
        try:
            return self._judge(record)
        except Refused as refusal:
            self.book.dead[record.partition, record.offset] = str(refusal)
            return REFUSED

    def _step(self) -> None:
        if not self.config:
            return
        step_s = self.log_time_ms // (self.config["step_s"] * 1000) * self.config["step_s"]
        if step_s != self.step_s:
            self.step_s = step_s
            self.version = max([self.version, *(each for each, at_s in self.changes.items() if at_s <= step_s)])
            self._flush((step_s - self.config["billing_grace_s"]) // self.config["billing_window_s"])

    def _judge(self, record: Record) -> str:
        if not record.value:
            raise Refused("empty")
        number, content = unframe(record.value)
        key = (record.key or b"").decode("utf-8", "replace")
        broadcast = number == COMMAND_ID and content["account"] == "*"
        if key != content["account"] or (not broadcast and lane(key) % self.partitions != record.partition % GROWN):
            raise Refused("misrouted")
        if not self.config and not (number == COMMAND_ID and content["kind"] == "log.open"):
            raise Refused("not_open")
        if number == COMMAND_ID:
            return self._command(record, content)
        return self._usage(record, content)

    def _command(self, record: Record, command: dict[str, Any]) -> str:
        try:
            body = json.loads(command["body"])
        except ValueError:
            body = None
        self._check_signature(record, command, body)
        kind, account = command["kind"], command["account"]
        if not isinstance(body, dict) or not _body_is_good(kind, body):
            raise Refused("bad_command")
        if abs(record.append_ms * 1000 - command["signed_at"]) > 600 * 10**6:
            raise Refused("stale_command")
        if kind in ("customer.bind", "policy.set") and self._account(account) is None:
            raise Refused("unknown_account")
        if command["command_id"] in self.commands:
            return DUPLICATE
        self.commands.add(command["command_id"])
        self._apply(kind, account, body)
        return ACCEPTED

    def _check_signature(self, record: Record, command: dict[str, Any], body: Any) -> None:
        headers = dict(record.headers)
        public = self.keys.get(headers.get("kid", b"").decode("utf-8", "replace"))
        if not self.config and command["kind"] == "log.open" and isinstance(body, dict):
            public = body.get("public_key")
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public or ""))
            key.verify(headers.get("sig", b""), record.value or b"")
        except (InvalidSignature, ValueError) as error:
            raise Refused("bad_signature") from error

    def _apply(self, kind: str, account: str, body: dict[str, Any]) -> None:
        if kind == "log.open" and not self.config:
            self.config = self.book.config = body
            self.book.epochs.add(body["epoch"])
            self.keys[body["kid"]] = body["public_key"]
            self._step()
        elif kind == "key.add":
            self.keys[body["kid"]] = body["public_key"]
        elif kind == "meter.add":
            self.meters[body["meter"]] = self.book.meters[body["meter"]] = body.get("event_name")
        elif kind == "fold.change":
            self.changes[body["version"]] = body["at_s"]
        elif kind == "price.add":
            self.prices.setdefault(body["price_ref"], body)
        elif kind == "account.open":
            self.accounts.setdefault(account, Account())
        elif kind == "customer.bind":
            self.accounts[account].customer = body["customer"]
            self.book.bound.setdefault(account, body["customer"])
        elif kind == "policy.set":
            self.accounts[account].counts = body["counts"]

    def _account(self, name: str) -> Account | None:
        if name not in self.accounts and self.config.get("auto_open"):
            self.accounts[name] = Account()
        return self.accounts.get(name)

    def _usage(self, record: Record, event: dict[str, Any]) -> str:
        check_content(event)
        append_us = record.append_ms * 1000
        if event["occurred_at"] < append_us - 34 * DAY * 10**6:
            raise Refused("too_late")
        born_ms = int(event["source"][:12], 16)
        if born_ms < self.log_time_ms - 5 * DAY * 1000:
            raise Refused("source_expired")
        if born_ms > self.log_time_ms + DAY * 1000:
            raise Refused("source_ahead")
        account = self._account(event["account"])
        if account is None:
            raise Refused("unknown_account")
        self._check_price(event)
        verdict = self._seen(event)
        if verdict != ACCEPTED:
            return verdict
        billed_us = append_us if event["occurred_at"] > append_us + 60 * 10**6 else event["occurred_at"]
        counted_us = event["occurred_at"] if event["hold"] is not None else max(billed_us, append_us - HOUR * 10**6)
        row = Row(record, str(event["trace_id"]), billed_us, counted_us, account.customer, self.version)
        self.book.rows.append(row)
        self.book.principals.add((event["account"], event["principal"]))
        self.book.late += event["occurred_at"] < append_us - 60 * 10**6
        self._count(account, row, event)
        self._bill(row, event)
        return ACCEPTED

    def _check_price(self, event: dict[str, Any]) -> None:
        if event["price_ref"] is None:
            return
        price = self.prices.get(event["price_ref"])
        if price is None:
            raise Refused("unknown_price")
        due = sum(nano * event["quantities"].get(meter, 0) for meter, nano in price["unit_nano"].items())
        if (event["revenue_nano"], event["revenue_asset"]) != (due, price["asset"]):
            raise Refused("price_mismatch")

    def _seen(self, event: dict[str, Any]) -> str:
        if event["sequence"]:
            pair = (event["source"], lane(event["account"]))
            return self.sequences.setdefault(pair, Sequences()).take(event["sequence"])
        occurred, log_us = event["occurred_at"], self.log_time_ms * 1000
        if not log_us - HOUR * 10**6 < occurred <= log_us + 60 * 10**6:
            raise Refused("unsequenced_age")
        if event["event_id"] in self.event_ids:
            return DUPLICATE
        self.event_ids.add(event["event_id"])
        return ACCEPTED

    def _count(self, account: Account, row: Row, event: dict[str, Any]) -> None:
        if event["status"] not in ("ok", "error"):
            return
        touched: set[Total] = set()
        for rule in account.counts:
            if rule["meter"] not in event["quantities"] or rule["meter"] not in self.meters:
                continue
            for window in rule["windows"]:
                start = window_start(window, row.counted_us // 10**6)
                end = window_end(window, start)
                if end is not None and end + KEEP_S[window] <= self.step_s:
                    continue
                scopes = {scopes_of(event, kind) for kind in rule["scopes"]} - {None}
                touched |= {(event["account"], str(scope), rule["meter"], window, start) for scope in scopes}
        for total in touched:
            self.book.used[total] += event["quantities"][total[2]]

    def _bill(self, row: Row, event: dict[str, Any]) -> None:
        if event["status"] not in BILLED[row.version] or event["rail"] is not None:
            return
        window_s = self.config["billing_window_s"]
        start = row.billed_us // 10**6 // window_s * window_s
        for meter, units in event["quantities"].items():
            if self.meters.get(meter) is None or not units:
                continue  # a zero is no part of a delta: it does not move its time
            key = (event["account"], row.customer or "", meter, event["price_ref"] or "", start)
            sums = self.open.setdefault(key, [0, 0])
            sums[0] += units
            sums[1] = max(sums[1], row.billed_us)

    def _flush(self, flush: int) -> None:
        """Send every accumulator of a bound account whose window has ended by flush · window."""
        if flush <= self.last_flush:
            return
        self.last_flush, due = flush, {}
        window_s = self.config["billing_window_s"]
        for key in [key for key in self.open if key[4] + window_s <= flush * window_s]:
            account, customer, meter, price_ref, start = key
            customer = customer or self.accounts[account].customer or ""
            if customer:
                units, last_us = self.open.pop(key)
                sums = due.setdefault((account, customer, meter, price_ref, start), [0, 0])
                sums[0] += units
                sums[1] = max(sums[1], last_us)
        for key, (units, last_us) in due.items():
            self._send(key, units, last_us, flush)

    def _send(self, key: tuple[str, str, str, str, int], units: int, last_us: int, flush: int) -> None:
        account, customer, meter, _, start = key
        name = str(self.meters[meter])
        for part in range(max(1, -(-units // UNITS_MAX))):
            share = min(UNITS_MAX, units - part * UNITS_MAX)
            identifier = stripe_identifier(self.config["deployment"], key, flush, part)
            self.book.deltas[identifier] = Delta(account, customer, meter, name, start, share, last_us)

    def still_open(self) -> int:
        """Accumulators with units that a later flush will send."""
        return sum(1 for key, (units, _) in self.open.items() if units and (key[1] or self.accounts[key[0]].customer))


def _body_is_good(kind: str, body: dict[str, Any]) -> bool:
    """Enough to tell a command that means something from one that does not."""
    needs = {
        "log.open": ("epoch", "deployment", "kid", "public_key"),
        "key.add": ("kid", "public_key"),
        "meter.add": ("meter",),
        "fold.change": ("version", "at_s"),
        "price.add": ("price_ref", "asset", "unit_nano"),
        "account.open": (),
        "customer.bind": ("customer",),
        "policy.set": ("counts",),
    }
    if kind not in needs or any(name not in body for name in needs[kind]):
        return False
    if kind == "meter.add":
        return bool(METER.fullmatch(str(body["meter"])))
    return kind != "customer.bind" or bool(ID.fullmatch(str(body["customer"])))


class Oracle:
    """All partitions. Feed it records as they come, each partition's in offset order."""

    def __init__(self, partitions: int) -> None:
        self.book = Book()
        self.partitions = {number: Partition(number, partitions, self.book) for number in range(partitions)}
        self.growth, self.count = 0, partitions

    def grow(self, partitions: int) -> None:
        """The log that was fed is at its end; what is fed from here on is the next one's."""
        before, first = self.growth * GROWN, (self.growth + 1) * GROWN
        for number in range(partitions):
            parent = self.partitions[before + number % self.count]
            self.partitions[first + number] = parent.child(first + number, partitions)
        for number in range(self.count):
            self.partitions[before + number].open = {}  # its children's by now
        self.growth, self.count = self.growth + 1, partitions

    def feed(self, records: list[Record]) -> None:
        for record in records:
            self.partitions[record.partition].feed(record)

    def still_open(self) -> int:
        """Deltas that no flush has sent yet."""
        return sum(partition.still_open() for partition in self.partitions.values())

    def holes(self) -> dict[tuple[str, int], dict[int, int]]:
        """(source, lane) → sequences that a later one has passed, as first → last."""
        return {
            pair: dict(sequences.holes)
            for partition in self.partitions.values()
            for pair, sequences in partition.sequences.items()
            if sequences.holes
        }
