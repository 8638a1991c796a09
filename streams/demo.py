"""`tollway demo`: a whole stack, three services that are called for a while, and the proof that all sides agree."""

import asyncio
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from tollway.connectors.control import Control, Signer
from tollway.connectors.errors import Fatal, Refused
from tollway.connectors.kafka import log_partitions, started_producer
from tollway.connectors.stripe import Delivered, StripePort
from tollway.schemas import codec
from tollway.schemas.lane import lane, partition, tag
from tollway.schemas.topics import USAGE
from tollway.streams import settings as settings_module
from tollway.streams.bootstrap import new_command_id
from tollway.streams.demo_books import (
    Books,
    Difference,
    differences,
    event_name,
    read_clickhouse,
    read_kafka,
    read_redis,
    read_stripe,
    services_book,
)
from tollway.streams.demo_service import ACCOUNTS, FLUSH_S, METERS, SERVICES
from tollway.streams.demo_view import Watch, conclusion, line, live
from tollway.streams.local import local_stack
from tollway.streams.settings import Settings
from tollway.streams.wiring import kafka_admin, redis_client, stripe_port

RATE = 200.0
"""Calls a second and service."""
LOOK_S, LINE_S = 0.5, 5.0
SETTLE_S = 90.0
SETTLE_POLL_S = 1.0
MARK = ".tollway-demo"
POLICY = {
    "counts": [
        {"meter": "calls", "windows": ["m", "h", "d", "M"], "scopes": ["acct", "principal"]},
        *({"meter": meter, "windows": ["d", "M"], "scopes": ["acct"]} for meter in METERS[1:]),
    ]
}
Progress = Callable[[str], None]


def run_demo(settings: Settings, *, seconds: int, plant_fault: bool, as_json: bool) -> int:
    """Run it in `<data>/demo`, which a former demo's data make way for. Returns 0 only where all sides agree.

    Raises Refused where that folder is something else.
    """
    data, began = _fresh(settings.data.absolute() / "demo"), time.monotonic()

    def progress(said: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {said}\n")
        sys.stderr.flush()

    stack = local_stack(data, progress, test_windows=True)
    with stack:
        demo = Demo(settings_module.read(data=data), seconds, progress, quiet=as_json or not sys.stdout.isatty())
        books, wrong = asyncio.run(demo.run(plant_fault))
        progress("stopping")
    if as_json:
        print(json.dumps(answer(books, wrong, seconds)))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(conclusion(books, wrong))
    return 1 if wrong else 0


def _fresh(folder: Path) -> Path:
    """An empty folder of our own."""
    mark = folder / MARK
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise Refused(f"{folder} is not empty and not of a demo: move it away, or give another --data")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise Refused(f"--data {folder.parent} cannot be written ({error.strerror}): give another folder") from error
    return folder


def answer(books: Books, wrong: list[Difference], seconds: int) -> dict[str, Any]:
    """The object that `--json` prints."""
    services, clickhouse = books.side("services"), books.side("ClickHouse")
    redis, stripe = books.side("Redis"), books.side("Stripe")
    return {
        "events": services.events,
        "kafka_events": books.side("Kafka").events,
        "clickhouse_rows": clickhouse.events,
        "redis_units": sum(units for (_, meter), units in (redis.counted or {}).items() if meter == "calls"),
        "stripe_units": sum((stripe.billable or {}).values()),
        "dead_letters": books.side("Kafka").dead_letters,
        "reconciled": not wrong,
        "differences": [str(difference) for difference in wrong],
        "seconds": seconds,
        "units": {
            book.name: {
                what: {meter: sum(n for (_, of), n in units.items() if of == meter) for meter in METERS}
                for what, units in (("counted", book.counted), ("billable", book.billable))
                if units is not None
            }
            for book in books.sides
        },
    }


class Demo:
    """The services, the picture, the books."""

    def __init__(self, settings: Settings, seconds: int, progress: Progress, *, quiet: bool) -> None:
        self.settings, self.seconds, self.progress, self.quiet = settings, seconds, progress, quiet
        self.port: StripePort = stripe_port(settings)
        self.customers: dict[str, str] = {}
        self.partitions = 0
        self.since_s = int(time.time())

    async def run(self, plant_fault: bool) -> tuple[Books, list[Difference]]:
        """All of it. Raises Fatal where a service fails."""
        self.partitions = await log_partitions(kafka_admin(self.settings))
        try:
            await self._open()
            services = [await self._service(name) for name in SERVICES]
            await self._show(services)
            reports = [await _report(service) for service in services]
            written = await self._write_broken()
            return await self._settle(reports, written, plant_fault)
        finally:
            await self.port.close()

    async def _open(self) -> None:
        """Meters and customers at Stripe, then meters, accounts, binds and policies in the log."""
        signer = Signer.read(self.settings.data / "control.key")
        for meter in METERS:
            await self.port.ensure_meter(event_name(meter))
        producer = await started_producer(self.settings.kafka_bootstrap, self.settings.kafka_security())
        control = Control(producer, signer, self.partitions, new_command_id)
        try:
            for meter in METERS:
                await control.broadcast("meter.add", {"meter": meter, "event_name": event_name(meter)})
            for account in ACCOUNTS:
                self.customers[account] = await self.port.ensure_customer(account)
                await control.send(account, "account.open", {"name": account.title()})
                await control.send(account, "customer.bind", {"customer": self.customers[account]})
                await control.send(account, "policy.set", POLICY)
        finally:
            await producer.stop()
        self.progress(f"{len(ACCOUNTS)} accounts open, {len(METERS)} meters declared; three services start")

    async def _service(self, name: str) -> asyncio.subprocess.Process:
        argv = ["-m", "tollway.streams.demo_service", "--bootstrap", self.settings.kafka_bootstrap, "--service", name]
        argv += [
            "--spool",
            str(self.settings.data / "spool" / name),
            "--seconds",
            str(self.seconds),
            "--rate",
            str(RATE),
        ]
        return await asyncio.create_subprocess_exec(sys.executable, *argv, stdout=asyncio.subprocess.PIPE)

    async def _show(self, services: list[asyncio.subprocess.Process]) -> None:
        """Until the services have ended."""
        watch = Watch(self.settings, self.partitions)
        await watch.start()
        ended = asyncio.gather(*(service.wait() for service in services))
        until = time.monotonic() + self.seconds
        before = None
        picture = None if self.quiet else Live(refresh_per_second=4, transient=True)
        try:
            if picture:
                picture.start()
            while not ended.done() and time.monotonic() < until + FLUSH_S:
                now = await watch.look()
                if picture:
                    picture.update(live(now, before, until - time.monotonic()))
                else:
                    self.progress(line(now, before))
                before = now
                await asyncio.wait([ended], timeout=LOOK_S if picture else LINE_S)
        finally:
            if picture:
                picture.stop()
            for service in services:
                if service.returncode is None:
                    service.terminate()
            await ended
            await watch.close()

    async def _write_broken(self) -> int:
        """What a broken client may write, past every SDK: each record must become a dead letter."""
        good = {"event_id": "0" * 32, "source": "0" * 32, "sequence": 1, "occurred_at": 0, "surface": "rest"}
        good |= {"operation": "broken", "account": ACCOUNTS[0], "principal_kind": "user", "principal": "mallory"}
        negative = {**good, "status": "ok", "latency_us": 1, "quantities": {"calls": -1}}
        values = [b"not avro", codec.encode("UsageEvent", negative), codec.encode("UsageEvent", negative)[:20]]
        producer = await started_producer(self.settings.kafka_bootstrap, self.settings.kafka_security())
        home = partition(lane(ACCOUNTS[0]), self.partitions)
        try:
            for value in values:
                await producer.send_and_wait(USAGE.name, value, key=ACCOUNTS[0].encode(), partition=home)
        finally:
            await producer.stop()
        return len(values)

    async def _settle(
        self, reports: list[dict[str, Any]], written: int, plant_fault: bool
    ) -> tuple[Books, list[Difference]]:
        """Read all sides until they agree, or for SETTLE_S: windows close, grace passes, deltas are sent."""
        until, planted, said = time.monotonic() + SETTLE_S, False, ""
        while True:
            books = Books([services_book(reports, written), *await self._sides()])
            wrong = differences(books)
            if not wrong and plant_fault and not planted:
                await self._plant()
                planted = True
                continue
            if not wrong or planted or time.monotonic() > until:
                return books, wrong
            behind = Counter(difference.side for difference in wrong)
            saying = "settling: " + ", ".join(f"{side} lacks {count} sums" for side, count in behind.items())
            if saying != said:
                self.progress(said := saying)
            await asyncio.sleep(SETTLE_POLL_S)

    async def _sides(self) -> list[Any]:
        now_s = int(time.time())
        return [
            await read_kafka(self.settings, self.partitions),
            await read_clickhouse(self.settings),
            await read_redis(self.settings),
            await read_stripe(self.port, self.customers, self.since_s, now_s),
        ]

    async def _plant(self) -> None:
        """One unit lost in Redis, one doubled at Stripe."""
        self.progress("planting one lost unit in Redis and one doubled unit at Stripe")
        account, client = ACCOUNTS[0], redis_client(self.settings)
        key = f"{tag(lane(account))}s:{account}~acct"
        try:
            fields = [name.decode() if isinstance(name, bytes) else name for name in await client.hkeys(key)]
            month = next(name for name in fields if name.startswith("calls M:") and name.endswith(" u"))
            await client.hincrby(key, month, -1)
        finally:
            await client.aclose()
        doubled = (event_name("calls"), self.customers[account], 1, int(time.time()))
        sent = await self.port.send(f"planted-{time.time_ns()}", *doubled)
        if not isinstance(sent, Delivered):
            raise Fatal(f"the doubled unit could not be planted: {sent}")


async def _report(service: asyncio.subprocess.Process) -> dict[str, Any]:
    """What a service says it emitted. Raises Fatal where it failed."""
    out = await service.stdout.read() if service.stdout else b""
    if service.returncode:
        raise Fatal(f"a sample service ended with code {service.returncode}: {out[-300:].decode(errors='replace')}")
    found: dict[str, Any] = json.loads(out)
    return found
