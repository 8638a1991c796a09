"""A client that repeats itself is heard once a minute, with a count of what was left out."""

import logging

import pytest

from tests.usage_log import NOWHERE, eventually
from tollway.connectors.emitter import Emitter
from tollway.connectors.hush import KINDS_MAX, OnceAMinute


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def line(text: str, value: int = 0, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("x", level, "", 0, text, (value,), None)


def test_each_kind_passes_once_a_minute_and_counts_what_it_left_out() -> None:
    """Other values are the same kind, another level or text is not; after a minute it says how many were left out."""
    clock = Clock()
    once = OnceAMinute(60.0, clock)
    assert once.filter(line("node %d is away", 1))
    assert [once.filter(line("node %d is away", node)) for node in (1, 2)] == [False, False]
    assert once.filter(line("node %d is away", 1, logging.ERROR))
    assert once.filter(line("topic %d is away"))
    clock.now = 60.0
    again = line("node %d is away", 7)
    assert once.filter(again)
    assert again.getMessage() == "node 7 is away (and 2 lines like it)"


def test_kinds_are_bounded() -> None:
    """The longest unheard kind is forgotten, and then said again."""
    once = OnceAMinute(60.0, Clock())
    assert all(once.filter(line(f"kind {number} %d")) for number in range(KINDS_MAX + 1))
    assert once.filter(line("kind 0 %d"))
    assert not once.filter(line(f"kind {KINDS_MAX} %d"))


def left_out() -> int:
    names = [name for name in logging.root.manager.loggerDict if name.startswith("aiokafka.")]
    known = [found for name in names for found in logging.getLogger(name).filters]
    known += logging.getLogger("aiokafka").filters
    return sum(found.left_out() for found in known if isinstance(found, OnceAMinute))


async def test_a_service_hears_of_an_absent_kafka_once(caplog: pytest.LogCaptureFixture) -> None:
    """While the client tries again and again, each kind of its lines is in the service's log once."""
    emitter = Emitter(NOWHERE, durability="memory")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("aiokafka")]:
        logging.getLogger(name).filters.clear()  # what other tests have heard
    with caplog.at_level(logging.WARNING, logger="aiokafka"):  # the doctor, in this process, made it silent
        await emitter.start()
        await eventually(lambda: left_out() >= 2)
        await emitter.close(deadline_s=0)
    kinds = [(record.name, record.levelno, record.msg) for record in caplog.records if "aiokafka" in record.name]
    assert len(kinds) == len(set(kinds))
