"""What the demo shows while it runs, and the table at its end."""

import time
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tollway.schemas.lane import lane, tag
from tollway.schemas.topics import DEAD_LETTERS, METER_EVENTS, USAGE
from tollway.streams.demo_books import Books, Difference
from tollway.streams.demo_service import METERS
from tollway.streams.settings import Settings
from tollway.streams.wiring import redis_client

BUSY = ("acme", "cyberdyne", "globex", "hooli")
"""The accounts whose quotas are shown."""
SHOWN_MAX = 12
GROUP_TOPICS = {"accounts": USAGE.name, "audit": USAGE.name, "stripe": METER_EVENTS.name}
"""Of a log that has not grown: the demo's own."""


@dataclass
class Look:
    """One moment of the pipeline."""

    at_s: float
    appended: int
    meter_events: int
    dead_letters: int
    lag: dict[str, int] = field(default_factory=dict)
    quotas: dict[str, dict[str, int]] = field(default_factory=dict)


class Watch:
    """Looks at Kafka's ends, the groups' committed offsets and Redis, over connections that stay open."""

    def __init__(self, settings: Settings, partitions: int) -> None:
        self._settings, self._partitions = settings, partitions
        where = {"bootstrap_servers": settings.kafka_bootstrap, **settings.kafka_security()}
        self._consumer = AIOKafkaConsumer(**where, enable_auto_commit=False)
        self._admin = AIOKafkaAdminClient(**where)
        self._redis = redis_client(settings)

    async def start(self) -> None:
        """Connect."""
        await self._consumer.start()
        await self._admin.start()

    async def look(self) -> Look:
        """As it is now."""
        ends = {topic: await self._ends(topic) for topic in (USAGE.name, METER_EVENTS.name, DEAD_LETTERS.name)}
        appended, events, letters = (sum(found.values()) for found in ends.values())
        look = Look(time.monotonic(), appended, events, letters)
        for group, topic in GROUP_TOPICS.items():
            done = await self._admin.list_consumer_group_offsets(f"tollway.{group}")
            committed = {tp.partition: at.offset for tp, at in done.items() if tp.topic == topic}
            look.lag[group] = sum(end - max(0, committed.get(number, 0)) for number, end in ends[topic].items())
        for account in BUSY:
            look.quotas[account] = await self._quota(account)
        return look

    async def _ends(self, topic: str) -> dict[int, int]:
        wanted = [TopicPartition(topic, number) for number in range(self._partitions)]
        return {tp.partition: end for tp, end in (await self._consumer.end_offsets(wanted)).items()}

    async def _quota(self, account: str) -> dict[str, int]:
        fields = await self._redis.hgetall(f"{tag(lane(account))}s:{account}~acct")
        found: dict[str, int] = {}
        for name, text in fields.items():
            meter, window, kind = (name.decode() if isinstance(name, bytes) else name).split(" ")
            if kind == "u" and window.startswith("M:"):
                found[meter] = found.get(meter, 0) + int(text)
        return found

    async def close(self) -> None:
        """Disconnect."""
        await self._consumer.stop()
        await self._admin.close()
        await self._redis.aclose()


def live(now: Look, before: Look | None, seconds_left: float) -> RenderableType:
    """The moving picture: rates, lag, quotas."""
    rate = 0.0 if before is None else (now.appended - before.appended) / max(0.001, now.at_s - before.at_s)
    flow = Table(title=f"three services are being called, {max(0.0, seconds_left):.0f} s to go", title_justify="left")
    names = ["records/s", "records", *(f"lag {group}" for group in now.lag), "meter events", "dead letters"]
    for name in names:
        flow.add_column(name, justify="right")
    figures = [rate, now.appended, *now.lag.values(), now.meter_events, now.dead_letters]
    flow.add_row(*(f"{figure:,.0f}" for figure in figures))
    quotas = Table(title="used this month, as a gate reads it from Redis", title_justify="left")
    quotas.add_column("account")
    for meter in METERS:
        quotas.add_column(meter, justify="right")
    for account, used in now.quotas.items():
        quotas.add_row(account, *(f"{used.get(meter, 0):,}" for meter in METERS))
    return Group(flow, quotas)


def line(now: Look, before: Look | None) -> str:
    """The same in one line, where there is no terminal."""
    rate = 0.0 if before is None else (now.appended - before.appended) / max(0.001, now.at_s - before.at_s)
    lag = ", ".join(f"{group} {records:,}" for group, records in now.lag.items())
    return (
        f"{rate:,.0f} records/s, {now.appended:,} records, lag: {lag}; "
        f"{now.meter_events:,} meter events, {now.dead_letters} dead letters"
    )


def conclusion(books: Books, wrong: list[Difference]) -> RenderableType:
    """One table in which all sides stand beside each other, and what it means."""
    table = Table(title="what each side holds", title_justify="left")
    table.add_column("")
    for book in books.sides:
        table.add_column(book.name, justify="right")
    table.add_column("")
    _row(table, "events", [book.events for book in books.sides])
    for meter in METERS:
        for what in ("counted", "billable"):
            figures = [_sum(getattr(book, what), meter) for book in books.sides]
            _row(table, f"{meter}, {what}", figures)
    _row(table, "dead letters", [book.dead_letters for book in books.sides])
    accounts = len({account for account, _ in books.sides[0].counted or ()})
    if not wrong:
        said = Text(
            f"All sides agree to the unit, in each of {accounts} accounts and {len(METERS)} meters.", style="green"
        )
    else:
        shown = "\n".join(str(difference) for difference in wrong[:SHOWN_MAX])
        more = f"\n… and {len(wrong) - SHOWN_MAX} more" if len(wrong) > SHOWN_MAX else ""
        said = Text(f"{len(wrong)} differences, account by account:\n{shown}{more}", style="red")
    return Group(table, said)


def _sum(units: dict[tuple[str, str], int] | None, meter: str) -> int | None:
    return None if units is None else sum(amount for (_, of), amount in units.items() if of == meter)


def _row(table: Table, name: str, figures: list[int | None]) -> None:
    kept = [figure for figure in figures if figure is not None]
    mark = "[green]=[/]" if len(set(kept)) == 1 else "[red]≠[/]"
    table.add_row(name, *("" if figure is None else f"{figure:,}" for figure in figures), mark)
